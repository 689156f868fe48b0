"""What the teacher alone is told: every method reads it where the teacher does and nowhere else, and runs take the same steps
on one process, on two ranks, broken off, from a cache, and with nothing told at all."""

import importlib.util
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.config.root import StageConfig
from minillm.data.instructions import Example, PromptSet
from minillm.data.sources import DataError
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.protocol import TrainingData
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.teachers.local import LocalTeacher
from minillm.train.stage import StageBuilder
from minillm.train.stage_data import read_stage_data
from tests.methods.conftest import assert_same_run, killed, steps_of, trained, two_ranks  # noqa: F401  fixtures
from tests.runs import Silent, records, train

TOLD = [240, 241, 242]  # ids of no prompt and of no reference
EXAMPLES = [
    Example(
        place, [60 + place, *[70] * place], [90 + place, 91, 256][: 2 + place % 2], "", (), 
        teacher_prompt="told", teacher_prompt_ids=[*TOLD[: 1 + place % 3], 60 + place, *[70] * place],
    )
    for place in range(4)
]  # fmt: skip
TOLD_BEFORE = {tuple(one.prompt_ids): one.teacher_prompt_ids for one in EXAMPLES}
METHODS = {
    "kd": {"ce_ratio": 0.3},
    "taid": {"steps": 10},
    "gkd": {"on_policy": 1.0, "beta": 0.3},
    "minillm": {"alpha": 0.0, "lm_coef": 0.0},
    "opd": {},
    "distillm": {"steps": 10, "threshold_start": 1.0, "lm_coef": 0.0},
    "distillm2": {},
    "seqkd": {"kd_ratio": 0.5},
    "dpkd": {"pairs": "sequence", "lm_coef": 0.0},
    "dpkd, tokens": {"pairs": "token_argmax", "lm_coef": 0.0},
    "llavadi": {"features_coef": 1.0, "features_tokens": "answers", "logits_coef": 1.0, "logits_tokens": "answers"},
}


def loss_of(name: str, models, rollouts: LocalRollouts, examples: list[Example], folder: Path) -> torch.Tensor:
    """The loss of the first step of a method on these prompts."""
    torch.manual_seed(0)
    method = build_method(
        StageConfig(
            output_dir="unused", seed=3, student={"path": "unused"}, teacher={"path": "unused"},
            method={"name": name.partition(",")[0], **METHODS[name]},
            rollout={"buffer_size": 4, "batch_size": 4, "max_new_tokens": 5},
            train={"max_steps": 1, "per_device_train_batch_size": 4},
        )
    )  # fmt: skip
    data = TrainingData(Stream(examples, seed=1), None, rollouts, folder)
    module = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch", modules=method.modules(models))
    items = method.collect(data, models, draw=0)
    return sum(module(term)[0] / term.count for term in method.terms(items, data, models))


@pytest.fixture
def read(monkeypatch) -> dict[str, list]:
    """Every text that either model is fed while the test runs, and the teacher's rows beside what they were asked of."""
    seen = {"rows": []}
    real = {name: getattr(LocalTeacher, name) for name in ("rows", "layers")}

    def rows(teacher, batch):
        said = real["rows"](teacher, batch)
        seen["rows"].append((teacher, batch.sequences, said.hidden))
        return said

    def layers(teacher, batch, layers):
        said = real["layers"](teacher, batch, layers)
        seen["rows"].append((teacher, batch.sequences, said[-1] if -1 in said else None))
        return said

    monkeypatch.setattr(LocalTeacher, "rows", rows)
    monkeypatch.setattr(LocalTeacher, "layers", layers)
    return seen


def texts_fed(model, into: list):
    """A hook that keeps the ids of every text that a model is fed in one go."""

    def keep(module, args, kwargs):
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        for place, row in enumerate(ids.tolist()):
            here = mask[place].tolist() if mask is not None and mask.shape == ids.shape else [1] * len(row)
            into.append([one for one, there in zip(row, here, strict=True) if there])

    return model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_is_told_and_the_student_is_not(name, make_models, read, tmp_path):
    models = make_models()
    rollouts = LocalRollouts(models)
    rollouts.check("student", "teacher")  # texts of its own
    fed = []
    hook = texts_fed(models.student, fed)
    loss = loss_of(name, models, rollouts, EXAMPLES, tmp_path / "told")
    hook.remove()
    prompts = [one.prompt_ids for one in EXAMPLES]
    whole = [ids for ids in fed if len(ids) > 1]  # a token after a cache is a text of one
    assert whole and all(any(ids[: len(one)] == one for one in prompts) for ids in whole)

    asked = [(one, hidden) for _, sequences, hidden in read["rows"] for one in sequences if hidden is not None]
    assert asked and all(one.teacher_prompt == TOLD_BEFORE[tuple(one.prompt)] for one, _ in asked)
    for teacher, sequences, hidden in read["rows"]:
        if hidden is not None:
            with torch.no_grad():
                by_hand = [
                    teacher.model.model(torch.tensor([one.teacher_prompt + one.response])).last_hidden_state[
                        0, len(one.teacher_prompt) - 1 : -1
                    ]
                    for one in sequences
                ]
            torch.testing.assert_close(hidden, torch.cat(by_hand), rtol=1e-4, atol=1e-5)

    untold = [replace(one, teacher_prompt=None, teacher_prompt_ids=None) for one in EXAMPLES]
    assert abs(loss - loss_of(name, models, rollouts, untold, tmp_path / "untold")) > 1e-4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    """A model that becomes its own teacher, by given texts, by answers of the moment and by a buffer of them."""
    folder = tmp_path_factory.mktemp("context")
    document = small_run(folder, layers=1)
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    hints = [f"say {line['completion']}" for line in lines]
    hints[2] = ""  # the teacher reads what the student does
    told = [line | {"hint": hint, "nothing": ""} for line, hint in zip(lines, hints, strict=True)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, told)) + "\n")
    context = {"teacher_context": "hint", "teacher_prompt": "{context}. {prompt}", "max_teacher_prompt_length": 40}
    document["eval"]["sets"]["held_out"] |= context
    document["student"]["config"]["initializer_range"] = 0.5  # so that what comes first changes what is said last
    document["train"] |= {"max_steps": 2, "adam_epsilon": 1e-3}
    oneself = {
        "student": {"path": "stage:base", "init": "pretrained", "config": None},
        "teacher": {"path": "stage:base"},
        "data": {"prompts": context},
    }
    document["stages"] = {
        "base": {"eval": {"sets": None}},
        "gkd": {**oneself, "method": {"name": "gkd", "on_policy": 0.5, "beta": 0.3}},
        "minillm": {**oneself, "method": {"name": "minillm", "alpha": 0.0, "lm_coef": 0.0}},
    }
    return _written(document, folder / "recipe.yaml")


def _written(document: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed, one_thread):  # noqa: F811
    broken, places = killed(first=100, later=30)
    assert places & {("gkd", 1), ("minillm", 1)}, places
    assert_same_run(broken, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):  # noqa: F811
    for stage in ("gkd", "minillm"):
        for ours, theirs in zip(steps_of(two_ranks, stage), steps_of(trained, stage), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), stage


def test_the_report_and_the_card_say_what_was_told(trained):  # noqa: F811
    report, card = (trained / "report.md").read_text(), (trained / "final" / "README.md").read_text()
    assert "## Told to the teacher alone in stage gkd" in report and "| say the cat sat. the cat sat? |" in report
    assert "In 7 of 8 prompts" in report and "in stage base" not in report
    assert "Divergences of held_out are from the teacher that reads the context" in report
    assert "| prompt of the teacher | say the cat sat. the cat sat? |" in report
    assert "the teacher alone was told `hint` of each record" in card


def test_a_checkpoint_is_not_gone_on_from_with_another_context(trained, recipe):  # noqa: F811
    with pytest.raises(UserError, match="teacher_context"):
        train(recipe, f"output_dir={trained}", "stages.minillm.data.prompts.teacher_context=prompt", resume=True)


def test_nothing_told_is_the_run_without_the_key(recipe, tmp_path, monkeypatch):
    """Beside which a self-teacher keeps the weights that the student has left."""
    from minillm.train.trainer import StageTrainer

    pairs, run = [], StageTrainer.run
    monkeypatch.setattr(StageTrainer, "run", lambda one, **keys: (run(one, **keys), pairs.append(one.models))[0])
    document = yaml.safe_load(recipe.read_text())
    groups = [
        document["eval"]["sets"]["held_out"],
        *(document["stages"][one]["data"]["prompts"] for one in ("gkd", "minillm")),
    ]
    empty, without = tmp_path / "empty", tmp_path / "without"
    for group in groups:
        group["teacher_context"] = "nothing"
    train(_written(document, tmp_path / "empty.yaml"), f"output_dir={empty}")
    for group in groups:
        for key in ("teacher_context", "teacher_prompt", "max_teacher_prompt_length"):
            group.pop(key, None)  # YAML's anchors: two of them are one
    train(_written(document, tmp_path / "without.yaml"), f"output_dir={without}")
    assert_same_run(empty, without, ("final", "stages/gkd"))

    for models in pairs[1:3]:  # gkd, minillm
        weights = load_file(empty / "stages" / "base" / "model.safetensors")
        teacher = dict(models.teacher.model.named_parameters())
        assert all(torch.equal(teacher[name], weights[name]) for name in weights if name in teacher)
        addresses = {one.data_ptr() for one in teacher.values()}
        assert addresses.isdisjoint(one.data_ptr() for one in models.student.parameters())
        assert any(not torch.equal(one, teacher[name]) for name, one in models.student.named_parameters())


def test_what_is_told_changes_the_steps_and_whom_evaluations_compare_with(trained, tmp_path, recipe):  # noqa: F811
    told = [one for one in records(trained) if one["stage"] == "gkd"]
    other = tmp_path / "other"
    keys = ["stages.gkd.data.prompts.teacher_context=nothing", "stages.minillm=null"]
    _, console = train(recipe, f"output_dir={other}", *keys, "eval.sets.held_out.teacher_context=nothing")
    untold = [one for one in records(other) if one["stage"] == "gkd"]
    first, last = (next(one["mean"] for one in run if one.get("who") == "student") for run in (told, untold))
    assert first["reverse_kl_nats"] > 1e-3 and first["forward_kl_nats"] > 1e-3  # before any step: of the context alone
    assert last["reverse_kl_nats"] == pytest.approx(0, abs=1e-6)
    assert not any("without the context" in note for note in console.notes)
    ours, theirs = ([one["loss"] for one in run if one["kind"] == "train"] for run in (told, untold))
    assert all(abs(one - other) > 1e-4 for one, other in zip(ours, theirs, strict=True))


def test_evaluations_without_it_are_noted_and_texts_beyond_a_table_of_positions_refused(recipe, make_models, tmp_path):
    told = PromptSet(EXAMPLES, 0, "here")
    untold = PromptSet([replace(EXAMPLES[0], teacher_prompt=None, teacher_prompt_ids=None)], 0, "there")
    stage = load_run([recipe], [f"output_dir={tmp_path}"]).stages[1]
    builder, models = StageBuilder(Silent(), tmp_path, None), make_models()
    held_out = {"eval.sets.a": untold, "eval.sets.b": told}
    builder._look_at_context(stage, SimpleNamespace(prompts=told), models, held_out)
    (note,) = builder.console.notes
    assert note.startswith("eval.sets.a: the divergences are those from the teacher that reads the student's prompt")
    builder._look_at_context(stage, SimpleNamespace(prompts=untold), models, held_out)
    assert len(builder.console.notes) == 1
    short = SimpleNamespace(
        model=SimpleNamespace(config=GPT2Config(n_positions=10)), abilities=models.teacher.abilities
    )
    with pytest.raises(UserError, match="10 positions, but the longest prompt with max_new_tokens needs 14"):
        builder._look_at_context(stage, SimpleNamespace(prompts=told), replace(models, teacher=short), held_out)


def test_a_stage_without_a_teacher_does_not_look_for_it(recipe, tmp_path):
    """In a file whose stages share the keys: here of a field that no record has."""
    path = _written(yaml.safe_load(recipe.read_text()), tmp_path / "shared.yaml")
    run = load_run([path], [f"output_dir={tmp_path / 'run'}"])
    base, gkd = run.stages[:2]
    keys = gkd.config.data.prompts.model_copy(update={"teacher_context": "{absent}"})
    data = gkd.config.data.model_copy(update={"prompts": keys})
    shared = replace(base, config=base.config.model_copy(update={"data": data}))
    assert read_stage_data(shared, tmp_path, datetime.now()).prompts.told == 0
    kd = shared.config.model_copy(update={"method": gkd.config.method, "teacher": None})
    with pytest.raises(DataError, match="data.prompts.teacher_context names the field absent"):
        read_stage_data(replace(shared, config=kd), tmp_path, datetime.now())


def test_its_recipe_is_planned(monkeypatch):
    from minillm.planning.planner import plan_run

    monkeypatch.chdir(Path(__file__).parents[2])
    (told, distil) = plan_run(load_run([Path("configs/self_distillation.yaml")]), gpu="cpu").stages
    assert [(term.name, term.teacher) for term in distil.work.terms] == [("distillation", True)]
    assert not any(term.teacher for term in told.work.terms)
