"""Runs with a served teacher take the steps of those with the same teacher here, and outlive servers that go away."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm import UserError
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.serving.served_model import ServedModel
from minillm.teachers.served import ServedTeacher
from minillm.train.trainer import StageTrainer, TrainingError
from tests.conftest import tiny_llama
from tests.distributed.conftest import finish, start  # noqa: F401  fixtures
from tests.runs import TRAIN, TWO_RANKS, records, train
from tests.serving.conftest import LiveServer, live  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]
# kd asks while it steps, minillm in its collections, distillm keeps a state and adapts to evaluations, and of distillm2
# the teacher samples
METHODS = {
    "kd": {"ce_ratio": 0.3},
    "minillm": {"alpha": 0.0, "lm_coef": 0.5, "pt_kd_ratio": 0.5},
    "distillm": {"steps": 40, "threshold_start": 0.95, "threshold_step": 0.2, "replay_size": 6},
    "distillm2": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a teacher."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=48, seed=1, tie=True)
    save_model(model, tokenizer, folder / "teacher")
    return folder


@pytest.fixture
def server(folder, live) -> LiveServer:  # noqa: F811
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    return live(ServedModel("tiny", model, byte_tokenizer()))


@pytest.fixture
def recipe(folder, small_run, tmp_path) -> Callable[..., Path]:
    """A function that writes a run of a method with a teacher."""

    def write(method: str, teacher: dict, **prompts) -> Path:
        document = small_run(tmp_path, layers=1)
        document["student"]["config"]["vocab_size"] = 257
        document["method"] = {"name": method, **METHODS[method]}
        document["teacher"] = teacher
        document["data"]["prompts"] |= prompts
        document["train"] |= {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        document["save"] = {"keep": 2, "best": False}
        path = tmp_path / f"{method}-{teacher.get('type', 'local')}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return write


def served_by(server: LiveServer, **keys) -> dict:
    return {"type": "served", "url": server.url, "patience_seconds": 0.2, **keys}


def students(folder: Path) -> list[dict]:
    """The records of a run but for those that measure the teacher, which only one that is here can be."""
    return [one for one in records(folder) if one.get("who") != "teacher"]


def assert_same(one: Path, other: Path) -> None:
    assert students(one) == students(other)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["kd", "minillm", "distillm2"])
def test_steps_and_evaluations_are_those_with_the_teacher_here(method, recipe, server, folder, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    train(recipe(method, {"path": str(folder / "teacher")}), f"output_dir={here}")
    train(recipe(method, served_by(server)), f"output_dir={there}")
    assert_same(here, there)
    measured = next(one for one in students(there) if one["kind"] == "eval")["mean"]
    assert {"reverse_kl_nats", "forward_kl_nats", "sequence_reverse_kl_nats"} <= set(measured)


def test_rewards_are_exact_where_a_server_sends_its_likeliest_ids(recipe, server, folder, tmp_path):
    for name, teacher in (("here", {"path": str(folder / "teacher")}), ("there", served_by(server, rows="top_k", k=2))):
        train(recipe("minillm", teacher), f"output_dir={tmp_path / name}", "train.max_steps=1", "eval=null")
    ours, theirs = (students(tmp_path / name)[0] for name in ("here", "there"))
    assert theirs["policy_loss"] == pytest.approx(ours["policy_loss"], rel=1e-4) and ours["policy_loss"] != 0


@pytest.mark.parametrize("method", ["kd", "distillm2"])
def test_what_the_teacher_alone_is_told_reaches_a_server(method, recipe, server, folder, tmp_path):
    told = {"teacher_context": "say {completion}", "max_teacher_prompt_length": 40}
    runs = {"here": {"path": str(folder / "teacher")}, "there": served_by(server)}
    for name, teacher in runs.items():
        train(recipe(method, teacher, **told), f"output_dir={tmp_path / name}")
    train(recipe(method, runs["here"]), f"output_dir={tmp_path / 'untold'}")
    assert_same(tmp_path / "here", tmp_path / "there")
    losses = [
        [one["loss"] for one in records(tmp_path / name) if one["kind"] == "train"] for name in ("there", "untold")
    ]
    assert all(abs(one - other) > 1e-5 for one, other in zip(*losses, strict=True))


def stop_before(monkeypatch, name: str, server: LiveServer, call: int) -> None:
    """The server goes away before the n-th call of a method of the trainer."""
    calls, original = [], getattr(StageTrainer, name)

    def counted(self, *arguments):
        calls.append(name)
        if len(calls) == call:
            server.stop()
        return original(self, *arguments)

    monkeypatch.setattr(StageTrainer, name, counted)


@pytest.mark.parametrize(
    ("method", "where", "call"),
    [
        ("kd", "_take_step", 3),
        ("minillm", "_take_step", 3),  # which collects
        ("distillm", "_take_step", 4),
        ("distillm", "_evaluate", 2),  # after step 2, by which it adapts
        ("kd", "_evaluate", 3),  # the last one
    ],
)
def test_a_run_without_servers_stops_with_a_checkpoint_and_goes_on(
    method, where, call, recipe, server, tmp_path, monkeypatch
):
    path = recipe(method, served_by(server))
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(path, f"output_dir={unbroken}")
    with monkeypatch.context() as patch:
        stop_before(patch, where, server, call)
        # rows that were asked for ahead may have come
        steps = f"{call - 1}|{call}" if where == "_take_step" else f"{2 * (call - 1)}"
        with pytest.raises(
            TrainingError, match=f"no server of the teacher.*checkpoint-({steps}) has everything so far"
        ):
            train(path, f"output_dir={broken}")
    server.start()
    train(path, f"output_dir={broken}", resume=True)
    assert_same(unbroken, broken)
    if method == "distillm":  # its buffer, in which no answer of the step that was given up may be twice
        kept, again = (folder / "checkpoint-4" / "state" / "method.pt" for folder in (unbroken, broken))
        assert kept.read_bytes() == again.read_bytes()


def test_a_run_whose_servers_are_gone_before_its_first_step_says_so(recipe, server, tmp_path, monkeypatch):
    stop_before(monkeypatch, "_take_step", server, 1)
    with pytest.raises(TrainingError, match="stage 'main' has taken no step yet"):
        train(recipe("kd", served_by(server)), f"output_dir={tmp_path / 'run'}", "eval=null")


def test_a_run_goes_on_where_its_teacher_has_moved_and_not_with_another(
    recipe,
    server,
    live,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    run = tmp_path / "run"
    path = recipe("kd", served_by(server))
    with monkeypatch.context() as patch:
        stop_before(patch, "_take_step", server, 3)
        with pytest.raises(TrainingError):
            train(path, f"output_dir={run}", "eval=null")
    other = live(ServedModel("other", tiny_llama(vocab_size=257, hidden_size=48, seed=9), byte_tokenizer()))
    with pytest.raises(
        UserError, match="began with tiny in float32 as its teacher, and what is served now, other in float32"
    ):
        train(path, f"output_dir={run}", "eval=null", f"teacher.url={other.url}", resume=True)
    moved = live(server.served)
    train(path, f"output_dir={run}", "eval=null", f"teacher.url={moved.url}", resume=True)
    assert len(students(run)) == 4


def test_a_tokenizer_of_other_ids_is_refused_by_name(recipe, live, tmp_path):  # noqa: F811
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({f"w{number}": number for number in range(256)} | {"<|end|>": 256}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>")
    server = live(ServedModel("words", tiny_llama(vocab_size=257, seed=2), tokenizer))
    with pytest.raises(
        UserError, match="student and teacher have different tokenizers: id 0 is '!' .* 'w0' for the teacher"
    ):
        train(recipe("kd", served_by(server)), f"output_dir={tmp_path / 'run'}")


def test_the_configuration_in_the_repository_runs(server, tmp_path):
    overrides = [f"output_dir={tmp_path / 'run'}", f"teacher.url={server.url}", "teacher.model=tiny"]
    train(ROOT / "configs" / "served.yaml", *overrides, "train.max_steps=2", "data.prompts.limit=16", "eval=null")
    assert [one["step"] for one in students(tmp_path / "run")] == [1, 2]


def test_the_next_step_is_asked_for_while_one_is_taken(recipe, server, tmp_path, monkeypatch):
    """Three of four steps are foreseen, of two micro-batches each, and no request is made in vain."""
    expected, expect = [], ServedTeacher.expect

    def noted(self, batches):
        batches = list(batches)
        expected.extend(batches)
        expect(self, batches)

    monkeypatch.setattr(ServedTeacher, "expect", noted)
    train(recipe("kd", served_by(server)), f"output_dir={tmp_path / 'run'}", "eval=null")
    assert len(expected) == 6
    assert 'minillm_requests_total{path="/rows",status="200"} 8' in server.server.config.app.state.metrics.text(
        waiting=0
    )


def failing_after(requests: int):
    """An application whose answers to /rows are status 500 after so many."""
    left = [requests]

    def wrap(app):
        async def answer(scope, receive, send):
            if scope["type"] == "http" and scope["path"] == "/rows":
                left[0] -= 1
                if left[0] < 0:
                    await send({"type": "http.response.start", "status": 500, "headers": []})
                    await send({"type": "http.response.body", "body": b""})
                    return
            await app(scope, receive, send)

        return answer

    return wrap


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_which_one_gets_no_rows_stop_together_and_go_on(
    recipe,
    server,
    live,  # noqa: F811
    start,  # noqa: F811
    finish,  # noqa: F811
    tmp_path,
):
    """The fifth request of a step of two is answered, and the sixth is not."""
    path, one, two = recipe("kd", served_by(server)), tmp_path / "one", tmp_path / "two"
    train(path, f"output_dir={one}", "eval=null")
    failing = live(server.served, wrap=failing_after(5))
    words = (*TRAIN, str(path), f"output_dir={two}", "eval=null", "engine.stage=3", *TWO_RANKS)
    ranks = start(2, *words, f"teacher.url={failing.url}")
    outputs = [process.communicate(timeout=180)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], outputs
    assert all("status 500" in output and "checkpoint-2 has everything so far" in output for output in outputs), outputs
    finish(start(2, *words, "--resume"))
    for ours, theirs in zip(students(two), students(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
