"""Runs with several teachers: the same one twice is that one, a resumed run takes the same steps, and what is wrong is said
before the first step."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from minillm import UserError
from minillm.cli.main import main
from minillm.config.loader.run_plan import load_run
from minillm.data.sources import DataError
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.planning.planner import plan_run
from minillm.reporting.model_card import write_model_card
from minillm.reporting.report import write_report
from minillm.serving.served_model import ServedModel
from minillm.teachers.local import LocalTeacher
from tests.conftest import tiny_llama
from tests.methods.conftest import assert_same_run
from tests.other_tokenizer import small_bpe
from tests.runs import die_after, in_a_child, records, train
from tests.serving.conftest import live  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]
BY_FIELD, MIXED = {"field": "domain"}, {"weights": {"math": 3, "chat": 1}}
# kd asks while it steps, minillm in its collections and keeps rows in its buffer, gkd on answers and on references,
# distillm keeps answers in its replay buffer, and opd keeps log-probabilities alone
METHODS = {
    "kd": {"ce_ratio": 0.3},
    "minillm": {"alpha": 0.0, "lm_coef": 0.0, "ppo_epochs": 2},
    "gkd": {"on_policy": 0.5},
    "distillm": {"steps": 40, "threshold_start": 0.95, "threshold_step": 0.0, "replay_size": 6, "lm_coef": 0.0},
    "opd": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with two teachers of different widths, whose heads are padded to different sizes."""
    folder = tmp_path_factory.mktemp("several")
    tokenizer = byte_tokenizer()
    for seed, (name, width, more) in enumerate((("math", 48, 0), ("chat", 32, 7))):
        model = tiny_llama(vocab_size=len(tokenizer) + more, hidden_size=width, layers=1, seed=seed)
        save_model(model, tokenizer, folder / name)
    return folder


@pytest.fixture
def recipe(folder, small_run, tmp_path):
    """A function that writes a run of a method, whose records name math, chat and math in turn."""

    def write(method: str, *, domains=("math", "chat", "math"), **groups) -> Path:
        document = small_run(tmp_path, layers=1)
        lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
        named = [{**line, "domain": domains[place % len(domains)]} for place, line in enumerate(lines)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
        document["method"] = {"name": method, **METHODS.get(method, {})}
        document["train"] |= {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        document["rollout"]["buffer_size"] = 8
        document["save"] = {"keep": 9, "best": False}
        if method != "kd":  # the evaluations of one method are enough
            document["eval"] = {}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**document, **groups}, sort_keys=False))
        return path

    return write


def local(folder: Path, *names: str) -> dict:
    """math and chat, which are the models of these names."""
    return {name: {"path": str(folder / model)} for name, model in zip(("math", "chat"), names, strict=True)}


def students(folder: Path) -> list[dict]:
    """The records of a run but for those that measure the teacher, which only one alone can be."""
    return [one for one in records(folder) if one.get("who") != "teacher"]


def assert_alike(one: Path, other: Path) -> None:
    """Equal to rounding; several teachers write no answers, over which the forward KL is."""
    ours, theirs = students(one), students(other)
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        if mine["kind"] == "eval":
            expected = {name: value for name, value in its["mean"].items() if not name.startswith("forward_kl")}
            assert mine["mean"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        else:
            numbers = {name: value for name, value in its.items() if isinstance(value, float)}
            assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_teacher_twice_is_that_teacher(method, recipe, folder, tmp_path):
    one = tmp_path / "one"
    train(recipe(method, teacher={"path": str(folder / "math")}), f"output_dir={one}")
    for by in (BY_FIELD, MIXED):
        several = tmp_path / next(iter(by))
        train(recipe(method, teachers=local(folder, "math", "math"), teachers_by=by), f"output_dir={several}")
        assert_alike(several, one)


@pytest.mark.parametrize("method", ["minillm", "opd", "gkd"])
def test_each_reads_what_it_is_told_beside_several_answers(method, recipe, folder, tmp_path, monkeypatch):
    """Answers to a prompt have its teacher and the prompt that this one reads; the steps are those with one teacher."""
    asked, rows = [], LocalTeacher.rows

    def seen(teacher, batch):
        asked.extend(batch.sequences)
        return rows(teacher, batch)

    keys = ["data.prompts.teacher_context=completion", "data.prompts.max_teacher_prompt_length=40",
            "data.prompts.teacher_prompt='{context}. {prompt}'", "rollout.answers_per_prompt=2",
            "train.max_steps=2"]  # fmt: skip
    keys += ["method.on_policy=1"] * (method == "gkd")
    one = tmp_path / "one"
    train(recipe(method, teacher={"path": str(folder / "math")}), f"output_dir={one}", *keys)
    monkeypatch.setattr(LocalTeacher, "rows", seen)
    for by in (BY_FIELD, MIXED):
        asked.clear()
        several = tmp_path / next(iter(by))
        train(recipe(method, teachers=local(folder, "math", "math"), teachers_by=by), f"output_dir={several}", *keys)
        assert_alike(several, one)
        words = byte_tokenizer()
        lines = map(json.loads, (tmp_path / "prompts.jsonl").read_text().splitlines())
        domains = {line["prompt"]: line["domain"] for line in lines}
        for text in asked:
            question, told = words.decode(text.prompt), words.decode(text.teacher_prompt)
            assert told == f"{question.removesuffix('?')}. {question}"
            assert text.judge == (None if by is MIXED else domains[question])
        answers = Counter(question for question, _ in {(tuple(text.prompt), tuple(text.response)) for text in asked})
        assert max(answers.values()) > 1


def test_records_of_one_teacher_alone_are_a_run_with_it(recipe, folder, tmp_path):
    """With another second teacher than in the run above, which would be seen if it were asked. To rounding: where one teacher
    scores what the student drew, its log-probabilities are those that were drawn with."""
    several, one = tmp_path / "several", tmp_path / "one"
    teachers = local(folder, "math", "chat")
    train(recipe("minillm", domains=["chat"], teachers=teachers, teachers_by=BY_FIELD), f"output_dir={several}")
    train(recipe("minillm", domains=["chat"], teacher={"path": str(folder / "chat")}), f"output_dir={one}")
    ours, theirs = ([line for line in students(where) if line["kind"] == "train"] for where in (several, one))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert {
            name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for name, value in other.items()
        } == one


def test_each_record_has_the_teacher_that_it_names(recipe, folder, tmp_path):
    """With the teachers' names exchanged in the records and in the configuration, nothing changes; in one of them, much."""
    losses = []
    for domains, models in ((("math", "chat"), ("math", "chat")), (("chat", "math"), ("chat", "math")),
                            (("math", "chat"), ("chat", "math"))):  # fmt: skip
        run = tmp_path / f"run-{len(losses)}"
        path = recipe("kd", domains=domains, teachers=local(folder, *models), teachers_by=BY_FIELD)
        train(path, f"output_dir={run}", "train.max_steps=2")
        losses.append([line["loss"] for line in students(run) if line["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize(("method", "by"), [("minillm", BY_FIELD), ("distillm", BY_FIELD)])
def test_a_killed_run_goes_on_bit_for_bit(method, by, recipe, folder, tmp_path):
    path = recipe(method, teachers=local(folder, "math", "chat"), teachers_by=by, save={"steps": 1, "best": False})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_a_child(lambda: train(path, f"output_dir={whole}")) == 0

    def die():
        from minillm.train.trainer import StageTrainer

        step = StageTrainer._take_step

        def last(self):
            if self.progress.stage_step == 3:
                die_after(1)
            return step(self)

        StageTrainer._take_step = last
        train(path, f"output_dir={killed}")

    assert in_a_child(die) != 0
    assert in_a_child(lambda: train(path, f"output_dir={killed}", resume=True)) == 0
    assert_same_run(whole, killed)


def test_a_resumed_run_has_its_teachers(recipe, folder, tmp_path):
    run = tmp_path / "run"
    path = recipe("kd", teachers=local(folder, "math", "chat"), teachers_by=MIXED)
    train(path, f"output_dir={run}", "train.max_steps=2", "train.lr_scheduler_type=constant")
    with pytest.raises(UserError, match=r"teachers_by.weights.chat \(1.0 then, 2.0 now\)"):
        train(path, f"output_dir={run}", "train.max_steps=2", "train.lr_scheduler_type=constant",
              "teachers_by.weights.chat=2", resume=True)  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"domain": "maths"}, "domain is 'maths', which is no teacher"),
        ({"domain": None}, "domain is None, which is no teacher"),
        ({"domain": ["math"]}, r"domain is \['math'\], which is no teacher"),
        ({}, "the record has no field 'domain', which would name its teacher"),
    ],
)
def test_a_record_without_a_known_teacher_is_named(line, said, recipe, folder, tmp_path):
    path = recipe("kd", teachers=local(folder, "math", "chat"), teachers_by=BY_FIELD)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a?", "completion": "b", **line}) + "\n")
    known = "teachers_by.field is 'domain', and the teachers are math, chat"
    with pytest.raises(DataError, match=rf"prompts.jsonl:9: {said}; {known}"):
        train(path)


def test_a_tokenizer_that_is_not_the_students_is_refused_by_the_teachers_name(recipe, folder, tmp_path):
    tokenizer = small_bpe()
    save_model(tiny_llama(vocab_size=len(tokenizer), layers=1), tokenizer, tmp_path / "other")
    teachers = local(folder, "math", "chat") | {"chat": {"path": str(tmp_path / "other")}}
    with pytest.raises(UserError, match="teachers.chat: student and teacher have different tokenizers"):
        train(recipe("kd", teachers=teachers, teachers_by=MIXED))


def test_caches_have_the_records_of_their_teachers_alone(recipe, folder, tmp_path):
    """A cache of a teacher's own records is enough, and the steps are those with the teachers here."""
    cached = {}
    for name in ("math", "chat"):
        path = recipe("cache", domains=[name], teacher={"path": str(folder / name)})
        keys = ("method.texts=[references]", "method.dtype=float32", f"data.prompts.limit={4 if name == 'math' else 5}")
        assert main(["cache", str(path), *keys, f"output_dir={tmp_path / f'cache-{name}'}"]) == 0
        cached[name] = {"type": "cached", "path": str(tmp_path / f"cache-{name}")}
    domains = ["math"] * 4 + ["chat"]  # the fifth record, which is not in math's cache, is chat's
    runs = {"here": local(folder, "math", "chat"), "cached": cached}
    for where, teachers in runs.items():
        path = recipe("kd", domains=domains, teachers=teachers, teachers_by=BY_FIELD)
        train(path, f"output_dir={tmp_path / where}", "data.prompts.limit=5", "train.per_device_train_batch_size=1")
    ours, theirs = ([one for one in students(tmp_path / where) if one["kind"] == "train"] for where in runs)
    assert ours == theirs
    with pytest.raises(UserError, match="cache-math/stages/main does not have 2 of 6"):
        train(
            recipe("kd", domains=["math"], teachers=cached, teachers_by=BY_FIELD), "data.prompts.limit=6", "eval=null"
        )


@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed")
@pytest.mark.parametrize("method", ["kd", "minillm"])  # asked a step ahead, and for a buffer
def test_one_that_is_served_is_asked_about_its_records_alone(method, recipe, folder, tmp_path, live):  # noqa: F811
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "chat").eval()
    server = live(ServedModel("chat", model, byte_tokenizer()))
    here = local(folder, "math", "chat")
    runs = {"here": here, "there": {**here, "chat": {"type": "served", "url": server.url}}}
    for where, teachers in runs.items():
        path = recipe(method, teachers=teachers, teachers_by=BY_FIELD, eval={})
        train(path, f"output_dir={tmp_path / where}", "train.max_steps=2")
    ours, theirs = (students(tmp_path / where) for where in runs)
    assert ours == theirs
    assert (tmp_path / "there" / "written" / "main" / "served_teacher-chat.json").is_file()


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train(Path("configs/several_teachers.yaml"), f"output_dir={tmp_path}", "train.max_steps=2")
    measured = [one for one in records(tmp_path) if one["kind"] == "eval"][-1]
    assert measured["stage"] == "distil" and measured["mean"]["reverse_kl_nats"] > 0
    *_, distil = plan_run(load_run([Path("configs/several_teachers.yaml")]), gpu="cpu").stages
    assert set(distil.simulation.teachers) == {"teacher math", "teacher words"}


def test_report_and_card_name_all_teachers(recipe, folder, tmp_path):
    run = tmp_path / "run"
    train(
        recipe("kd", teachers=local(folder, "math", "chat"), teachers_by=MIXED),
        f"output_dir={run}",
        "train.max_steps=1",
    )
    card = write_model_card(run, run / "final").read_text()
    assert "with several teachers: math (`math`, weight 3), chat (`chat`, weight 1)" in card
    report = write_report(run).read_text()
    assert "`teachers.math.path`" in report and "`teachers_by.weights`" in report
