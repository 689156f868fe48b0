"""Answers to prompts and to a conversation, with the template that a run was trained with."""

import io
from pathlib import Path

import pytest
import torch
import yaml

from minillm import UserError
from minillm.cli.generate import Answerer, converse, generate, prompt_keys
from minillm.config.data import InstructionKeys
from minillm.data.sources import DataError
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.reporting.console import Console
from minillm.rollout.rollouts import Sampling
from tests.pretended_devices import pretended_gpus

PLAIN = InstructionKeys(template="none")


@pytest.fixture
def folder(tmp_path, make_models) -> Path:
    made = make_models()
    save_model(made.student, made.tokenizer, tmp_path / "student")
    save_model(made.teacher.model, made.tokenizer, tmp_path / "teacher")
    return tmp_path


def test_both_models_answer_each_for_itself(make_models):
    answers = Answerer(make_models(), PLAIN, Sampling(12), seed=3).ask("hello")
    assert set(answers) == {"student", "teacher"}
    assert answers["student"] != answers["teacher"]
    alone = Answerer(make_models(teacher=False), PLAIN, Sampling(12), seed=3).ask("hello")
    assert alone == {"student": answers["student"]}


def test_the_same_question_again_is_drawn_anew_and_the_same_seed_repeats(make_models):
    models = make_models(teacher=False)
    first = Answerer(models, PLAIN, Sampling(12), seed=3)
    answers = [first.ask("hello"), first.ask("hello")]
    assert answers[0] != answers[1]
    again = Answerer(models, PLAIN, Sampling(12), seed=3)
    assert [again.ask("hello"), again.ask("hello")] == answers
    greedy = Answerer(models, PLAIN, Sampling(12, temperature=0.0), seed=3)
    assert greedy.ask("hello") == greedy.ask("hello")


def test_the_template_reaches_the_model(make_models):
    models = make_models(teacher=False)
    plain, chat = (
        Answerer(models, keys, Sampling(12, temperature=0.0), seed=0).ask("hello")
        for keys in (PLAIN, InstructionKeys(template="chat"))
    )
    assert plain != chat
    models.tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat"):
        Answerer(models, InstructionKeys(template="chat"), Sampling(4), seed=0).ask("hello")


def test_a_prompt_of_another_encoding_is_named(make_models):
    with pytest.raises(UserError, match="not text in UTF-8: 'caf"):
        Answerer(make_models(teacher=False), PLAIN, Sampling(4), seed=0).ask(
            b"caf\xe9".decode(errors="surrogateescape")
        )


def test_answers_stop_at_the_models_context(make_models):
    models = make_models(teacher=False)  # reads 512 tokens, a byte each
    answerer = Answerer(models, PLAIN, Sampling(50), seed=0)
    assert answerer._room("student", 500) == 12
    assert answerer._room("student", 10) == 50
    answerer.ask("x" * 510)
    with pytest.raises(ValueError, match="512 tokens and the student reads at most 512"):
        answerer.ask("x" * 512)


def test_prompts_of_the_command_line_are_answered_and_nothing_is_read():
    file = io.StringIO()
    converse(lambda text: {"student": text.upper()}, Console(rank=0, file=file), prompts=["a", "b"], read=None)
    assert file.getvalue().splitlines() == ["[student] A", "[student] B"]


def test_a_conversation_goes_on_to_the_end_of_input_and_skips_empty_lines():
    file, lines = io.StringIO(), iter(["one", "", "  ", "two"])

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(lambda text: {"student": text.upper()}, Console(rank=0, file=file), read=read)
    assert file.getvalue().splitlines() == ["[student] ONE", "[student] TWO"]


def test_the_verb_from_folder_to_answer(folder):
    def shown(**options) -> str:
        file = io.StringIO()
        console = Console(rank=0, file=file)
        generate(str(folder / "student"), console=console, prompts=["hi"], max_new_tokens=6, device="cpu", **options)
        return file.getvalue()

    alone = shown()
    assert alone.startswith("[student] ") and "[teacher]" not in alone
    assert "[teacher]" in shown(teacher=str(folder / "teacher"))
    assert shown(seed=1) != alone
    assert shown(top_k=1) == shown(temperature=0.0)


def test_a_teacher_on_a_device_of_its_own(folder, monkeypatch):
    def shown(**options) -> str:
        file = io.StringIO()
        options |= {"prompts": ["hi"], "max_new_tokens": 6, "device": "cpu"}
        generate(str(folder / "student"), console=Console(rank=0, file=file), **options)
        return file.getvalue()

    beside = shown(teacher=str(folder / "teacher"))
    with pretended_gpus(monkeypatch):
        assert shown(teacher=str(folder / "teacher"), teacher_device="cuda:1") == beside
    with pytest.raises(UserError, match="--teacher-device: there is no --teacher"):
        shown(teacher_device="cuda:1")
    with pytest.raises(UserError, match="--teacher-device is 'mps'; it must be cpu, cuda or cuda:N"):
        shown(teacher=str(folder / "teacher"), teacher_device="mps")


def test_a_device_that_is_not_there_is_named_by_its_option(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    both = {"teacher": str(folder / "teacher"), "prompts": ["hi"], "console": Console(rank=0, file=io.StringIO())}
    with pytest.raises(UserError, match="^--device is 'cuda', but torch sees no GPU here; use --device cpu$"):
        generate(str(folder / "student"), device="cuda", **both)
    with pytest.raises(UserError, match="^--teacher-device is 'cuda:1', .* use --teacher-device cpu$"):
        generate(str(folder / "student"), device="cpu", teacher_device="cuda:1", **both)


def test_lines_of_stdin_are_prompts(folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    file = io.StringIO()
    generate(str(folder / "student"), console=Console(rank=0, file=file), max_new_tokens=2, device="cpu")
    assert file.getvalue().count("[student]") == 2


def run_folder(tmp_path: Path, document: dict) -> Path:
    for place in ("final", "best", "checkpoint-3", "stages/first", "stages/last"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


def test_prompts_are_put_as_the_run_put_them(tmp_path):
    tokenizer = byte_tokenizer()
    prompts = {"path": "x.jsonl", "template": "chat", "system": "Be brief."}
    run = run_folder(
        tmp_path,
        {
            "data": {"prompts": prompts},
            "stages": {"first": {"data": {"prompts": {"template": "alpaca"}}}, "last": {"seed": 1}},
        },
    )
    for place in ("final", "best", "checkpoint-3", "stages/last"):
        keys = prompt_keys(str(run / place), tokenizer)
        assert (keys.template, keys.system) == ("chat", "Be brief.")
    assert prompt_keys(str(run / "stages" / "first"), tokenizer).template == "alpaca"
    assert prompt_keys(str(run / "final"), tokenizer, system="Else.").system == "Else."
    assert prompt_keys(str(run / "final"), tokenizer, template="none").template == "none"


def test_a_model_of_no_run_has_its_tokenizers_template(tmp_path):
    tokenizer = byte_tokenizer()
    assert prompt_keys("org/name", tokenizer).template == "chat"
    assert prompt_keys(str(tmp_path / "final"), tokenizer).template == "chat"
    run_folder(tmp_path, {"data": {"prompts": {"type": "of another version"}}})
    assert prompt_keys(str(tmp_path / "final"), tokenizer).template == "chat"
    tokenizer.chat_template = None
    assert prompt_keys("org/name", tokenizer).template == "none"


def test_a_system_message_needs_a_chat(tmp_path):
    tokenizer = byte_tokenizer()
    assert prompt_keys("org/name", tokenizer, system="Be brief.").system == "Be brief."
    with pytest.raises(ValueError, match="--system"):
        prompt_keys("org/name", tokenizer, template="alpaca", system="Be brief.")
