"""What must hold between `rollout` and the method, the batches and the engine."""

import pytest


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.7), ("top_k", 40), ("top_p", 0.9)])
def test_minillm_samples_only_from_the_models_own_distributions(recipe, key, value):
    found = recipe.problems(rollout={key: value})
    assert set(found) == {f"rollout.{key}"}
    assert "q/p~" in found[f"rollout.{key}"]
    assert recipe.problems(rollout={key: value}, method={"name": "gkd"}) == {}


def test_opd_weighs_a_temperature_but_no_other_distribution(recipe):
    def problems(**rollout):
        return recipe.problems(rollout=rollout, method={"name": "opd"})

    assert problems(temperature=0.7) == problems(temperature=1.5) == {}
    assert set(problems(top_k=40)) == {"rollout.top_k"} and set(problems(top_p=0.9)) == {"rollout.top_p"}


def test_the_teachers_answers_have_a_temperature_of_their_own(recipe):
    found = recipe.problems(rollout={"temperature": 0.7}, method={"name": "seqkd"})
    assert set(found) == {"rollout.temperature"} and "method.temperature" in found["rollout.temperature"]
    assert recipe.problems(rollout={"top_k": 5}, method={"name": "seqkd", "temperature": 0.7}) == {}


def test_a_buffer_divides_into_steps(recipe):
    train = {"max_steps": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    assert "240 and 252" in recipe.problems(rollout={"buffer_size": 250}, train=train)["rollout.buffer_size"]
    assert recipe.problems(rollout={"buffer_size": 252}, train=train) == {}
    assert recipe.problems(rollout={"buffer_size": 5}, train=train)["rollout.buffer_size"].endswith("that do: 12")
    assert recipe.problems(rollout={"buffer_size": 250}, train=train, method={"name": "gkd"}) == {}


def test_a_buffer_divides_into_the_steps_of_all_ranks(recipe, monkeypatch):
    train = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    assert recipe.problems(rollout={"buffer_size": 16}, train=train) == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = recipe.problems(rollout={"buffer_size": 16}, train=train)["rollout.buffer_size"]
    assert "x 2 ranks" in found and found.endswith("that do: 32")
    assert recipe.problems(rollout={"buffer_size": 32}, train=train) == {}


def test_graphs_on_a_device_that_may_be_a_gpu(recipe):
    for device in ("auto", "cuda", "cuda:1"):
        assert recipe.problems(rollout={"cuda_graphs": True}, engine={"device": device}) == {}
    assert recipe.load().stages[0].config.rollout.cuda_graphs is False


def test_graphs_on_a_cpu(recipe):
    found = recipe.problems(rollout={"cuda_graphs": True}, engine={"device": "cpu"})
    assert found == {"rollout.cuda_graphs": "needs a GPU, but engine.device is cpu"}
    assert recipe.problems(rollout={"cuda_graphs": False}, engine={"device": "cpu"}) == {}


def test_coins_need_a_mixture(recipe):
    assert recipe.problems(method={"name": "gkd"}) == {}  # nothing is said of the default
    shared = {"rollout": {"shared_coins": True}}
    assert recipe.problems(**shared) == {}
    for method in ({"name": "gkd"}, {"name": "minillm", "alpha": 0.0}, {"name": "minillm", "alpha": 1.0}):
        found = recipe.problems("rollout.shared_coins=true", method=method)
        assert set(found) == {"rollout.shared_coins"} and "no mixture" in found["rollout.shared_coins"]
    found = recipe.problems(rollout={"shared_coins": True, "cuda_graphs": True}, engine={"device": "cuda"})
    assert set(found) == {"rollout.shared_coins"} and "no step of fixed shapes" in found["rollout.shared_coins"]


def test_coins_are_shared_unless_a_loop_needs_both_models(recipe):
    def by_coins(**rollout):
        return recipe.load(rollout=rollout, engine={"device": "cuda"}).stages[0].config.rollout.by_coins

    assert by_coins() and by_coins(shared_coins=True) and not by_coins(shared_coins=False)
    assert not by_coins(cuda_graphs=True)
    assert not by_coins(answers_per_prompt=4, buffer_size=64, batch_size=8)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_graphs_under_deepspeed(recipe, stage):
    engine = {"type": "deepspeed", "stage": stage}
    assert "engine.type torch" in recipe.problems(rollout={"cuda_graphs": True}, engine=engine)["rollout.cuda_graphs"]
    assert "rollout.cuda_graphs" not in recipe.problems(rollout={}, engine=engine)


def test_several_answers_divide_what_is_decoded_and_trained_on(recipe):
    def problems(method="minillm", teacher=None, engine=None, answers=4, **rollout):
        rollout = {"buffer_size": 64, "batch_size": 8, "answers_per_prompt": answers, **rollout}
        groups = {"method": method if isinstance(method, dict) else {"name": method}, "rollout": rollout}
        groups |= {} if engine is None else {"engine": engine}
        return recipe.problems(**groups)

    assert problems() == problems("opd") == problems({"name": "gkd", "on_policy": 1.0}) == problems("seqkd") == {}
    assert "8 and 12" in problems(batch_size=10)["rollout.batch_size"]
    found = problems(answers=3, batch_size=9)
    assert set(found) == {"rollout.buffer_size"} and "63 and 66" in found["rollout.buffer_size"]
    assert (
        "steps of 8"
        in problems({"name": "gkd", "on_policy": 1.0}, answers=3, batch_size=9)["rollout.answers_per_prompt"]
    )
    for method in ("distillm2", {"name": "gkd", "on_policy": 0.5}, {"name": "seqkd", "temperature": 0.0}):
        assert "one answer to each prompt" in problems(method)["rollout.answers_per_prompt"]
    assert "shared_coins" in problems(shared_coins=True)["rollout.answers_per_prompt"]
    assert "cuda_graphs" in problems(cuda_graphs=True)["rollout.answers_per_prompt"]
    layers = {"type": "deepspeed", "gather": "layers"}
    assert "gather layers" in problems(engine=layers)["rollout.answers_per_prompt"]
    assert problems({"name": "gkd", "on_policy": 0.5}, answers=1) == {}


@pytest.mark.parametrize(
    "student, teacher, together",
    [("auto", None, True), ("auto", "cuda:0", True), ("cuda:1", "cuda:1", True), ("auto", "cuda:1", False),
     ("cuda:1", "cuda:0", False), ("cuda", "cpu", False)],
)  # fmt: skip
def test_a_graph_holds_the_models_of_one_device(recipe, student, teacher, together):
    keys = {"rollout": {"cuda_graphs": True}, "engine": {"device": student}, "teacher__device": teacher}
    found = recipe.problems(**keys)
    assert set(found) == (set() if together else {"rollout.cuda_graphs"})
    assert together or f"teacher.device is {teacher}" in found["rollout.cuda_graphs"]
    alone = {"name": "minillm", "alpha": 0.0}
    assert recipe.problems(method=alone, **keys) == {}, "the student answers alone"
