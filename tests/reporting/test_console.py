"""What is shown on a terminal, in a file and on other ranks."""

import io
import math
from pathlib import Path

import pytest

from minillm.reporting.console import Console, clean
from minillm.reporting.time_left import Limits


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def neutral(monkeypatch):
    for name in ("RANK", "FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def train(step: int, **more) -> dict:
    return {
        "stage_step": step,
        "seconds": 2.0 * step,
        "student_tokens": 10 * step,
        "loss": 1.23456,
        "tokens_per_s": 12345.6,
        **more,
    }


def evaluation(step: int, mean: dict, *, sets: dict | None = None, who: str = "student") -> dict:
    return {"stage": "distil", "stage_step": step, "who": who, "sets": sets or {"dolly": mean}, "mean": mean}


SAMPLE = {"set": "dolly", "index": 3, "prompt": "Why?", "answer": "So.", "teacher": "Because.", "reference": "It is."}


def everything(console: Console) -> None:
    with console:
        console.preflight([("model", "Llama", "Mistral"), ("prompts", "12 used")])
        console.start("distil", Limits(3), 0)
        for step in (1, 2, 3):
            console.step(train(step, reverse_kl_nats=0.5))
        console.evaluation(evaluation(3, {"rouge_l": 20.0, "reverse_kl_nats": 0.4}), [SAMPLE])
        console.note("passed over checkpoint-3")
        console.finish(Path("runs/x"))


def plain(*calls, clock=None) -> list[str]:
    file = io.StringIO()
    console = Console(rank=0, file=file, clock=clock or Clock())
    for name, *arguments in calls:
        getattr(console, name)(*arguments)
    return file.getvalue().splitlines()


def test_ranks_above_0_say_nothing(monkeypatch):
    for file in (io.StringIO(), Terminal()):
        everything(Console(rank=1, file=file))
        assert file.getvalue() == ""
    monkeypatch.setenv("RANK", "2")
    file = Terminal()
    everything(Console(file=file))
    assert file.getvalue() == ""


def test_without_a_terminal_there_are_plain_lines():
    file = io.StringIO()
    everything(Console(rank=0, file=file))
    text = file.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert "model: Llama | Mistral\nprompts: 12 used\n" in text
    assert "distil 1/3: loss 1.23 · reverse KL 0.500 · 12,346 tokens/s · ETA 4.00 s" in text
    assert "Evaluation of step 3 of stage distil\n  Reverse KL (nats/token) ↓: value 0.400\n" in text
    assert "Sample 3 of dolly\n  prompt: Why?\n  student: So.\n  teacher: Because.\n  reference: It is.\n" in text
    assert text.endswith(f"done: the model is in {Path('runs/x/final')}, the report is {Path('runs/x/report.md')}\n")


def test_on_a_terminal_there_are_tables_and_one_bar():
    file = Terminal()
    everything(Console(rank=0, file=file))
    text = file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor was hidden once, and shown again
    for words in ("Preflight", "Mistral", "3/3", "reverse KL 0.500", "12,346 tokens/s", "ETA", "Because.", "reference"):
        assert words in text


def test_the_terminal_is_left_as_it_was_when_a_run_fails():
    file = Terminal()
    with pytest.raises(RuntimeError), Console(rank=0, file=file) as console:
        console.start("distil", Limits(), 0)
        console.step(train(1))
        raise RuntimeError
    assert file.getvalue().rstrip().endswith("\x1b[?25h")


def test_lines_of_progress_are_some_seconds_apart_and_the_last_is_never_missing():
    file, clock = io.StringIO(), Clock()
    console = Console(rank=0, file=file, clock=clock)
    console.start("a", Limits(100), 0)
    for step in range(1, 101):
        clock.seconds = 0.1 * step
        console.step(train(step))
    shown = [line.partition("/")[0] for line in file.getvalue().splitlines()[1:]]
    assert shown == ["a 1", "a 51", "a 100"]


def test_the_eta_counts_from_where_a_run_goes_on():
    lines = plain(("start", "a", Limits(20), 10), ("step", train(11)), ("step", train(12)), ("step", train(20)))
    assert lines[0] == "stage a: step 10 of 20"
    assert "ETA" not in lines[1]  # nothing is known yet of how long a step takes
    clock = Clock()
    file = io.StringIO()
    console = Console(rank=0, file=file, clock=clock)
    console.start("a", Limits(20), 10)
    for step in (11, 15):
        console.step(train(step, seconds=3.0 * step))
        clock.seconds += 60
    assert file.getvalue().splitlines()[-1].endswith("ETA 15.0 s")


def test_a_stage_that_time_ends_has_no_total_and_the_time_that_is_left():
    lines = plain(("start", "a", Limits(seconds=180.0), 0), ("step", train(1)))
    assert lines == ["stage a: step 0 of ?", "a 1/?: loss 1.23 · 12,346 tokens/s · ETA 2 min 58 s"]
    file = Terminal()
    with Console(rank=0, file=file) as console:
        console.start("a", Limits(seconds=180.0), 0)
        console.step(train(1))
        (bar,) = console._progress.tasks
    assert (bar.completed, bar.total) == (2.0, 180.0) and "1/?" in file.getvalue()


def test_evaluations_are_held_against_the_best_before():
    file = io.StringIO()
    console = Console(rank=0, file=file)
    values = [(20.0, 0.5), (18.0, 0.4), (22.0, 0.6), (math.nan, math.inf), (22.0, 0.4)]
    for step, (rouge, kl) in enumerate(values):
        console.evaluation(evaluation(step, {"rouge_l": rouge, "reverse_kl_nats": kl, "entropy_nats": 1.0}), [])
    lines = file.getvalue().splitlines()
    rouge = [line.partition(": ")[2] for line in lines if "Rouge-L" in line]
    kl = [line.partition(": ")[2] for line in lines if "Reverse KL" in line]
    assert rouge[:3] == ["value 20.0", "value 18.0, best before 20.0", "value 22.0, best before 20.0, beaten"]
    assert rouge[3:] == ["value nan", "value 22.0, best before 22.0"]
    assert kl[:3] == ["value 0.500", "value 0.400, best before 0.500, beaten", "value 0.600, best before 0.400"]
    assert kl[4] == "value 0.400, best before 0.400"
    assert all("best" not in line for line in lines if "Entropy" in line)


def test_the_teachers_values_are_no_record_to_beat():
    file = io.StringIO()
    console = Console(rank=0, file=file)
    console.evaluation(evaluation(0, {"rouge_l": 50.0}, who="teacher"), [SAMPLE])
    console.evaluation(evaluation(1, {"rouge_l": 20.0}), [])
    text = file.getvalue()
    assert "Evaluation of the teacher of stage distil" in text
    assert "  teacher: So." in text
    assert "best before" not in text


def test_several_sets_are_columns_and_all_have_samples():
    sets = {"a": {"rouge_l": 10.0, "loss_nats": 2.0}, "b": {"rouge_l": 30.0}}
    samples = [{**SAMPLE, "set": name, "index": index} for name in "ab" for index in range(4)]
    lines = plain(("evaluation", evaluation(1, {"rouge_l": 20.0, "loss_nats": 2.0}, sets=sets), samples))
    assert "  Rouge-L (F1 × 100) ↑: mean 20.0, a 10.0, b 30.0" in lines
    assert "  Loss on references (nats/token) ↓: mean 2.00, a 2.00" in lines
    assert [line for line in lines if line.startswith("Sample")] == [
        "Sample 0 of a",
        "Sample 0 of b",
        "Sample 1 of a",
    ]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_texts_are_shown_as_they_are_and_steer_nothing(stream):
    file = stream()
    nasty = "[bold]b[/bold] [/x] \x1b[31mred\x07 :smile:"
    sample = {**SAMPLE, "answer": nasty, "prompt": "p" * 1000 + "END"}
    console = Console(rank=0, file=file)
    console.evaluation(evaluation(1, {"rouge_l": 20.0}), [sample])
    console.answers("", {"student": nasty})
    console.note(nasty)
    text = file.getvalue()
    assert "\x1b[31m" not in text and "\x07" not in text
    assert "[bold]b[/bold] [/x]" in text and ":smile:" in text
    assert "END" in text and "p" * 500 not in text  # an answer goes on from the end of its prompt


def test_control_characters_become_visible():
    assert clean("a\x1b[2Jb\r\nc\td\x9b") == "a�[2Jb�\nc\td�"


def test_long_answers_are_whole_when_asked_for():
    lines = plain(("answers", "", {"student": "word " * 200, "teacher": "short\nlines"}))
    assert lines[0] == "[student] " + "word " * 200
    assert lines[1:] == ["[teacher] short", "lines"]


def test_long_work_between_steps_shows_how_far_it_is():
    clock = Clock()
    file = io.StringIO()
    console = Console(rank=0, file=file, clock=clock)
    console.start("distil", Limits(3), 0)
    for done in (10, 20, 30, 40):
        console.working("sampling answers", done, 40)
        clock.seconds += 3.0
    assert file.getvalue().splitlines()[1:] == ["distil: sampling answers 10/40", "distil: sampling answers 30/40"]
    terminal = Terminal()
    with Console(rank=0, file=terminal, clock=clock) as console:
        console.start("distil", Limits(3), 0)
        console.working("sampling answers", 10, 40)
    assert "sampling answers 10/40" in terminal.getvalue()
