"""What lies on the device, in the host's memory and gathered, phase by phase."""

from tests.planning.small import ANSWER, BOTH, EVALUATION, PARAMETERS, SHARDED, planned


def test_the_buffer_is_counted_where_it_lies(recipe):
    path = recipe()
    bytes_of_buffer = 8 * ANSWER * (64 * 2 + 7 * 4)
    for gpu, place in (("cpu", "device"), ("A100-80GB", "host")):
        scoring = next(phase for phase in planned(path, gpu=gpu).memory if phase.phase == "scoring")
        assert getattr(scoring, place)["rollout buffer"] == 2 * bytes_of_buffer  # the old one beside the new one


def test_what_samples_and_scores_is_gathered_whole(recipe):
    """As the engine does it: minillm.rollout gathers once, so that no rank waits for another at every token."""
    stage = planned(recipe(), *SHARDED, BOTH, gpu="A100-80GB", world_size=2)
    gathered = {phase.phase: phase.device["gathered weights"] for phase in stage.memory}
    student, teacher = stage.simulation.student, stage.simulation.teacher
    both = 2 * (student.parameters + teacher.parameters)
    assert gathered == {"rollout": both, "scoring": both, "update": 2 * student.parameters + 2 * 640 * 64}
    for phase in stage.memory:  # beside the rank's own half
        assert phase.device["gradients"] == student.parameters  # DeepSpeed keeps their place
        assert abs(phase.device["teacher weights"] - teacher.parameters) < 1024


def test_by_layers_only_the_heads_are_whole(recipe):
    stage = planned(recipe(), *SHARDED, BOTH, "engine.gather=layers", gpu="A100-80GB", world_size=2)
    gathered = {phase.phase: phase.device["gathered weights"] for phase in stage.memory}
    models = stage.simulation.student, stage.simulation.teacher
    expected = sum(stage.sharding.layers(size) + 2 * size.head for size in models)
    assert gathered["rollout"] == gathered["scoring"] == expected


def test_supervised_teachers_are_gathered_layer_by_layer(recipe):
    keys = ["student.config.num_hidden_layers=1"]
    stage = planned(recipe(method={"name": "kd"}), *SHARDED, *keys, gpu="A100-80GB", world_size=2)
    scoring = next(phase for phase in stage.memory if phase.phase == "scoring")
    assert scoring.device["gathered weights"] == stage.sharding.layers(stage.simulation.teacher)


def test_an_evaluation_has_caches_and_gathers_of_its_own(recipe):
    stage = planned(recipe(eval=EVALUATION))
    assert [phase.phase for phase in stage.memory] == ["rollout", "scoring", "update", "evaluation"]
    timeline = stage.simulation.phases["evaluation"]
    tokens = 6 * (30 + 50 - 1) + 30  # of a prompt that is read ahead
    assert timeline.most("student KV cache") == tokens * 2 * 2 * 2 * 16 * 4
    assert timeline.most("teacher KV cache") == tokens * 4 * 2 * 2 * 16 * 2
    assert stage.simulation.losses["evaluation"].rows == 6 * 50
    alone = planned(recipe(eval={**EVALUATION, "teacher": False})).simulation.phases["evaluation"]
    assert alone.most("teacher KV cache") == 0 < alone.most("student KV cache")
    sharded = planned(recipe(eval=EVALUATION), *SHARDED, BOTH, gpu="A100-80GB", world_size=2)
    gathered = {phase.phase: phase.device["gathered weights"] for phase in sharded.memory}
    assert gathered["evaluation"] == gathered["scoring"] > gathered["update"]


def test_the_copy_that_a_checkpoint_is_written_from_lies_in_the_hosts_memory(recipe):
    path, weights = recipe(), 4 * PARAMETERS
    buffer = 8 * ANSWER * (64 * 2 + 7 * 4)
    whole = 3 * weights + 2 * buffer  # with two moments; a buffer of before, and one as it goes to the file

    def copies(*keys: str, place: str = "device", **options) -> set[int]:
        return {getattr(phase, place)["checkpoint copy"] for phase in planned(path, *keys, **options).memory}

    assert copies("save.steps=5") == copies("save.steps=5", place="host", gpu="A100-80GB") == {whole}
    assert copies("save.steps=5", gpu="A100-80GB") == {0}
    for none in ((), ("save.steps=5", "save.in_background=false")):
        assert copies(*none) == {0}
    sharded = planned(path, *SHARDED, "save.steps=5", gpu="cpu", world_size=2)
    # rank 0: all of the weights in bf16, half of their moments and, twice, of their masters, and its part of the buffer
    shard = 2 * PARAMETERS + (8 + 2 * 4) * PARAMETERS // 2 + 2 * 8 * ANSWER * (64 * 2 // 2 + 7 * 4)
    assert {phase.device["checkpoint copy"] for phase in sharded.memory} == {shard}
    path = recipe(eval=EVALUATION)
    assert copies() == {weights} and copies("save.best=false") == {0}
    assert copies("save.steps=5") == {whole}


def test_a_served_teacher_scores_the_students_own_answers_by_its_head_alone(recipe, tmp_path):
    """Whose hidden states come from elsewhere; the student looks at one answer."""
    served = f"teacher={{type: served, url: 'http://127.0.0.1:9', model: {tmp_path / 'teacher'}}}"
    alone, opd = (planned(recipe(), key, served) for key in ("method.alpha=0.0", "method.name=opd"))
    ours, both = ({phase.phase: phase.device for phase in one.memory}["scoring"] for one in (alone, opd))
    assert ours["teacher hidden states"] == both["teacher hidden states"] > 0 and ours["loss buffers"] > 0
    assert 0 < alone.speed.scoring_flops < opd.speed.scoring_flops  # which reads the reverse KL
