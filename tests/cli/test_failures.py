"""What a failure prints, and its exit status."""

import errno
import importlib
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

import minillm
from minillm.cli.failures import OF_THE_MACHINE, describe
from minillm.cli.main import main


def failing(error: BaseException):
    def run(plan, *, resume, console):
        raise error

    return run


def raised(call) -> BaseException:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_the_installed_command_has_no_traceback_for_a_wrong_file(folder):
    command = [sys.executable, "-m", "minillm.cli.main", "train", "gone.yaml"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "gone.yaml: no such file" in result.stderr and "Traceback" not in result.stderr


def test_errors_by_kind(folder, fake, capsys):
    from minillm.train.trainer import TrainingError

    fake("minillm.train.run", run=failing(TrainingError("step 3: loss nan")))
    assert main(["train", "run.yaml"]) == 1
    assert capsys.readouterr().err == "minillm: step 3: loss nan\n"

    fake("minillm.train.run", run=failing(KeyboardInterrupt()))
    assert main(["train", "run.yaml"]) == 130
    assert capsys.readouterr().err == "minillm: interrupted; --resume goes on from the last checkpoint\n"


def test_an_error_for_the_person_is_its_text(folder, fake, capsys):
    from minillm.data.sources import find_files

    fake("minillm.train.run", run=lambda plan, *, resume, console: find_files("nothing/*.jsonl"))
    assert main(["train", "run.yaml"]) == 2
    assert capsys.readouterr().err == "minillm: nothing/*.jsonl: no such file\n"


def test_a_package_of_the_trainer_that_is_missing_is_named_with_the_command_that_installs_it(
    folder, fake, monkeypatch, capsys
):
    """tests/test_wheel.py does without all of them; another package that is missing is a defect all the same."""
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "minillm.gone", None)
    fake("minillm.train.run", run=lambda plan, **options: importlib.import_module("rouge_score"))
    assert main(["train", "run.yaml"]) == 2
    assert capsys.readouterr().err == (
        "minillm: `minillm train` needs rouge-score, which is not installed: pip install -e '.[train]' in minillm's folder\n"
    )
    fake("minillm.train.run", run=lambda plan, **options: importlib.import_module("minillm.gone"))
    assert main(["train", "run.yaml"]) == 1
    assert "this is a defect of minillm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        raised(lambda: json.loads("{")),  # a ValueError, but nobody wrote it for the person
        KeyError("x"),
        FileNotFoundError(errno.ENOENT, "No such file", "of/our/own"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_other_error_is_a_defect_with_its_traceback_and_what_to_report(folder, fake, capsys, error):
    fake("minillm.train.run", run=failing(error))
    assert main(["train", "run.yaml"]) == 1
    *traceback, last = capsys.readouterr().err.splitlines()
    assert traceback[0].startswith("Traceback (most recent call last)")
    assert any("in run" in line for line in traceback)  # down to the line that raised it
    assert last.startswith("minillm: this is a defect of minillm. Please report it with the traceback above")
    assert "config.yaml" in last and "env.json" in last and minillm.__version__ in last


def test_a_message_does_not_control_the_terminal():
    text, _ = describe(minillm.UserError("a\x1b[2J\0b\nc ü"), [])
    assert text == "minillm: a\\x1b[2J\\x00b\nc ü\n"


def test_a_mistake_in_minillms_own_code_is_a_defect(folder, monkeypatch, capsys):
    from minillm.config.loader import run_plan

    monkeypatch.setattr(run_plan, "load_document", lambda *arguments: (1, 2, 3))  # unpacked into two names
    assert main(["train", "run.yaml"]) == 1
    assert "ValueError: too many values" in capsys.readouterr().err


@pytest.mark.parametrize("number", sorted(OF_THE_MACHINE), ids=errno.errorcode.get)
def test_what_the_machine_refuses_is_one_line(number):
    error = OSError(number, os.strerror(number), "runs/one/metrics.jsonl")
    text, status = describe(error, ["eval"])
    assert (text, status) == (f"minillm: {error}\n", 1)
    text, status = describe(error, ["train", "run.yaml"])
    assert text == f"minillm: {error}; set that right, and --resume goes on from the last checkpoint\n"


def test_a_full_disk_is_one_line_wherever_it_is_met(tmp_path):
    """torch says nothing of the disk where it opens the file itself, and little where it does not."""
    large = {"a": torch.zeros(10**6)}
    with open("/dev/full", "wb", buffering=0) as full:
        to_a_file = raised(lambda: torch.save(large, full))
    wrapped = raised(lambda: wrap(OSError(errno.ENOSPC, "No space left on device")))
    for error, words in (
        (to_a_file, "No space left on device"),
        (raised(lambda: torch.save(large, "/dev/full")), "the disk is full"),
        (wrapped, "No space left on device"),
    ):
        text, status = describe(error, [])
        assert words in text and text.count("\n") == 1 and status == 1


def wrap(cause: Exception) -> None:
    """As datasets wraps what it meets."""
    raise RuntimeError("An error occurred while generating the dataset") from cause


def test_a_disk_that_is_full_inside_safetensors_is_one_line(tmp_path):
    """A limit on the size of files stands for the disk: the library, written in Rust, has an error of its own for both."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SafetensorError) as caught:
            save_file({"a": torch.zeros(10**5)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    text, status = describe(caught.value, [])
    assert f"(os error {errno.EFBIG})" in text and text.count("\n") == 1 and status == 1
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert describe(full, [])[0] == f"minillm: {full}\n"
    damaged = SafetensorError("Error while deserializing header: HeaderTooLarge")
    assert "this is a defect" in describe(damaged, [])[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore"),
        MemoryError(),
        raised(lambda: torch.empty(2**60)),
    ],
    ids=["GPU", "Python", "CPU"],
)
def test_no_memory_is_one_line_that_says_what_helps(error):
    text, status = describe(error, [])
    assert text.startswith("minillm: out of memory") and "minillm plan" in text
    assert text.count("\n") == 1 and status == 1


def test_the_cause_counts_and_not_what_was_dealt_with_before():
    """An error in the handling of another one is about itself."""
    with pytest.raises(KeyError) as caught:
        try:
            raise PermissionError(errno.EACCES, "Permission denied")
        except PermissionError:
            {}["x"]
    assert "this is a defect" in describe(caught.value, [])[0]


def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minillm", "schema"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "minillm: [Errno 28] No space left on device\n"


def test_a_model_that_the_hub_does_not_have_is_a_message(folder, fake, monkeypatch, capsys):
    from minillm.models.tokenizers import load_tokenizer

    def from_the_hub(plan, *, resume, console):
        load_tokenizer(plan.stages[0].config.student, plan.output_dir)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fake("minillm.train.run", run=from_the_hub)
    assert main(["train", "run.yaml", "student.path=no-such-organisation/no-such-model"]) == 2
    assert "minillm: no-such-organisation/no-such-model: no folder here (from " in capsys.readouterr().err
