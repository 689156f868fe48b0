"""Runs whose teacher is on another device than the student, pretended: nothing mixes the two, and the records are those of one
device."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from minillm import UserError
from minillm.cli.eval import evaluate_model
from minillm.config.loader.evaluation_plan import load_evaluation
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.reporting.console import Console
from tests.conftest import tiny_llama
from tests.pretended_devices import pretended_gpus
from tests.runs import records, train

# kd asks for rows in the step; minillm samples from the mixture token by token or by coins, keeps rows in its buffer, and has a
# term on plain text; gkd reads answers of the student's; seqkd has the teacher answer alone; llavadi compares inner layers with
# a trained projector; okd trains adapters in the teacher on what the student says; cmc adds the teacher's logits to those of
# the student, in its answers too; uld and dskd-like methods sort probabilities; dpkd keeps log-probabilities of pairs
METHODS = {
    "kd": ({"name": "kd", "ce_ratio": 0.3}, {}),
    "mixture": ({"name": "minillm", "ppo_epochs": 2}, {"shared_coins": False}),
    "coins": ({"name": "minillm", "ppo_epochs": 2, "lm_coef": 0.0}, {"shared_coins": True}),
    "gkd": ({"name": "gkd", "on_policy": 0.5}, {}),
    "seqkd": ({"name": "seqkd"}, {}),
    "llavadi": ({"name": "llavadi", "features_coef": 0.5, "layers": [[1, 2]]}, {}),
    "okd": ({"name": "okd", "lora": {"r": 2, "alpha": 4}}, {}),
    "anchored okd": ({"name": "okd", "lora": {"r": 2, "alpha": 4}, "anchor": 0.5, "teacher_kd_ratio": 0.5}, {}),
    "cmc": ({"name": "cmc"}, {}),
    "uld": ({"name": "uld"}, {}),
}
PLACES = {  # engine.device, teacher.device
    "teacher on a GPU": ("cpu", "cuda:1"),
    "two GPUs": ("cuda:0", "cuda:1"),
    "teacher on the host": ("cuda:0", "cpu"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("teacher")
    save_model(tiny_llama(vocab_size=len(tokenizer) + 7, hidden_size=48, layers=2), tokenizer, folder)
    return folder


@pytest.fixture
def recipe(teacher, small_run, tmp_path):
    """A function that writes a run of one of METHODS."""

    def write(name: str, **groups) -> Path:
        method, rollout = METHODS[name]
        if method["name"] == "okd" and importlib.util.find_spec("peft") is None:
            pytest.skip("adapters need peft")
        document = small_run(tmp_path, layers=1)
        document |= {"teacher": {"path": str(teacher)}, "method": method}
        document["rollout"] |= rollout
        document["train"] |= {"max_steps": 2, "per_device_train_batch_size": 2}
        document["engine"] = {"type": "torch", "device": "cpu", "backend": "torch"}
        document["save"] = {"keep": 1, "best": False}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**document, **groups}, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="module")
def on_one_device():
    """A function that returns the records of one of METHODS on one device, where it is trained once."""
    found: dict[str, list[dict]] = {}

    def records_of(method: str, path: Path) -> list[dict]:
        if method not in found:
            train(path, f"output_dir={path.with_name('one')}")
            found[method] = records(path.with_name("one"))
        return found[method]

    return records_of


def placed(places: str) -> tuple[str, str]:
    here, there = PLACES[places]
    return f"engine.device={here}", f"teacher.device={there}"


def assert_alike(one: Path, other: Path | list[dict], **tolerance) -> None:
    """The records are those of the other run, times and memory aside."""
    ours, theirs = records(one), other if isinstance(other, list) else records(other)
    assert len(ours) == len(theirs) > 2
    for mine, its in zip(ours, theirs, strict=True):
        for name, value in its.items():
            if isinstance(value, float):
                assert mine[name] == pytest.approx(value, **tolerance), name
        if its["kind"] == "eval":
            assert mine["mean"] == pytest.approx(its["mean"], **tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_on_another_device_changes_no_number(method, recipe, on_one_device, tmp_path, monkeypatch):
    path = recipe(method)
    expected = on_one_device(method, path)
    with pretended_gpus(monkeypatch):
        train(path, f"output_dir={tmp_path / 'two'}", *placed("teacher on a GPU"))
    assert_alike(tmp_path / "two", expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("places", ["two GPUs", "teacher on the host"])
@pytest.mark.parametrize("method", ["kd", "mixture", "coins", "anchored okd", "llavadi"])
def test_nor_does_the_students_device(method, places, recipe, on_one_device, tmp_path, monkeypatch):
    """In blocks of other sizes, which round otherwise."""
    path = recipe(method)
    expected = on_one_device(method, path)
    with pretended_gpus(monkeypatch):
        train(path, f"output_dir={tmp_path / 'two'}", *placed(places))
    assert_alike(tmp_path / "two", expected, rel=1e-4, abs=1e-5)


def test_a_student_that_begins_as_its_teacher_is_on_its_own_device(recipe, teacher, tmp_path, monkeypatch):
    path = recipe("kd", student={"path": str(teacher)})
    train(path, f"output_dir={tmp_path / 'one'}")
    with pretended_gpus(monkeypatch):
        train(path, f"output_dir={tmp_path / 'two'}", *placed("two GPUs"))
    assert_alike(tmp_path / "two", tmp_path / "one", rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("by", [{"weights": {"a": 1, "b": 2}}, {"field": "who"}], ids=["weights", "field"])
@pytest.mark.parametrize("in_memory", ["all", "one"])
def test_several_teachers_are_each_on_their_own(by, in_memory, recipe, teacher, tmp_path, monkeypatch):
    named = {"a": {"path": str(teacher)}, "b": {"path": str(teacher)}}
    groups = {"teacher": None, "teachers": named, "teachers_by": {**by, "in_memory": in_memory}}
    path = recipe("kd", **groups)
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    named = [{**line, "who": "ab"[place % 2]} for place, line in enumerate(lines)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    train(path, f"output_dir={tmp_path / 'one'}")
    with pretended_gpus(monkeypatch, 3):
        where = ("engine.device=cuda:0", "teachers.a.device=cuda:1", "teachers.b.device=cuda:2")
        train(path, f"output_dir={tmp_path / 'two'}", *where)
    assert_alike(tmp_path / "two", tmp_path / "one", rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["mixture", "anchored okd"])
def test_a_run_goes_on_with_the_teacher_on_another_device(method, recipe, tmp_path, monkeypatch):
    path = recipe(method)
    train(path, f"output_dir={tmp_path / 'one'}", "train.max_steps=1")
    train(path, f"output_dir={tmp_path / 'one'}", resume=True)
    with pretended_gpus(monkeypatch):
        train(path, *placed("teacher on a GPU"), "train.max_steps=1")
    train(path, resume=True)
    assert_alike(tmp_path / "run", tmp_path / "one", rel=1e-6, abs=1e-7)
    with pretended_gpus(monkeypatch):
        train(path, *placed("teacher on a GPU"), "train.max_steps=3", resume=True)
    assert len(records(tmp_path / "run")) > len(records(tmp_path / "one"))


def test_a_cache_is_written_on_the_teachers_device(recipe, tmp_path, monkeypatch):
    path = recipe("kd", method={"name": "cache"})
    folders = tmp_path / "one", tmp_path / "two"
    train(path, f"output_dir={folders[0]}")
    with pretended_gpus(monkeypatch) as places:
        train(path, f"output_dir={folders[1]}", "teacher.device=cuda:1")
        assert {str(place) for place in places.of_storage.values()} <= {"cpu", "xpu:1"}
    files = [file.relative_to(folders[0]) for file in folders[0].glob("stages/main/**/*.safetensors")]
    assert files
    for file in files:
        assert (folders[1] / file).read_bytes() == (folders[0] / file).read_bytes()


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_an_evaluation_is_that_of_one_device(who, recipe, teacher, tmp_path, monkeypatch):
    path, results = recipe("kd", teacher={"path": str(teacher)}), []
    model = who if who == "teacher" else str(teacher)
    for keys in ((), placed("teacher on a GPU")):
        plan = load_evaluation([path], keys)
        with pretended_gpus(monkeypatch):
            results.append(evaluate_model(model, plan, Console(rank=1)))
    assert results[1]["mean"] == pytest.approx(results[0]["mean"], rel=1e-6, abs=1e-7)
    assert [one["answer"] for one in results[1]["samples"]] == [one["answer"] for one in results[0]["samples"]]


def test_a_device_that_is_not_there_is_an_error_before_any_work(recipe, tmp_path):
    path = recipe("kd", stages={"first": {"method": {"name": "sft"}}, "second": {"teacher": {"device": "cuda:7"}}})
    with pytest.raises(UserError, match="teacher.device is 'cuda:7', but torch sees"):
        train(path)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
