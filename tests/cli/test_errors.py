"""What a failure prints, and its exit status."""

import json
import subprocess
import sys

import pytest

from minillm.cli.main import main


def failing(error: Exception):
    def run(plan, *, resume, console):
        raise error

    return run


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


def test_an_error_that_minillm_raises_is_a_message_and_any_other_a_defect(folder, fake, capsys):
    from minillm.data.sources import find_files

    def for_the_user(plan, *, resume, console):
        find_files("nothing/*.jsonl")

    fake("minillm.train.run", run=for_the_user)
    assert main(["train", "run.yaml"]) == 2
    assert capsys.readouterr().err == "minillm: nothing/*.jsonl: no such file\n"

    def of_another_library(plan, *, resume, console):
        json.loads("{")  # a ValueError, but nobody wrote it for the user

    fake("minillm.train.run", run=of_another_library)
    with pytest.raises(json.JSONDecodeError):
        main(["train", "run.yaml"])

    fake("minillm.train.run", run=failing(KeyError("x")))
    with pytest.raises(KeyError):
        main(["train", "run.yaml"])


def test_a_mistake_in_minillms_own_code_keeps_its_traceback(folder, monkeypatch):
    from minillm.config.loader import run_plan as loading

    monkeypatch.setattr(loading, "load_document", lambda *arguments: (1, 2, 3))  # unpacked into two names
    with pytest.raises(ValueError, match="too many values"):
        main(["train", "run.yaml"])


def test_a_model_that_the_hub_does_not_have_is_a_message(folder, fake, monkeypatch, capsys):
    from minillm.models.tokenizers import load_tokenizer

    def from_the_hub(plan, *, resume, console):
        load_tokenizer(plan.stages[0].config.student, plan.output_dir)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fake("minillm.train.run", run=from_the_hub)
    assert main(["train", "run.yaml", "student.path=no-such-organisation/no-such-model"]) == 2
    assert "minillm: no-such-organisation/no-such-model: no folder here (from " in capsys.readouterr().err
