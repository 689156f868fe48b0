"""The benchmark of a whole update: our trainer really runs, and what is written is what was measured."""

import argparse
import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm import UserError
from minillm.benchmarks import step, step_providers
from minillm.benchmarks.step import BESIDE, COLUMNS, Case, Row, _ratio, main
from minillm.benchmarks.step_inputs import write_random, write_real
from tests import forked

ROOT = Path(__file__).parents[2]

TINY = [
    "--threads",
    "1",
    "--match",
    "128x2",
    "--vocab",
    "300",
    "--answers",
    "2",
    "--tokens",
    "3",
    "--prompt-tokens",
    "4",
]


@pytest.fixture
def forked_trainers(monkeypatch):
    """Trainers run in forked processes, but for that of another checkout, which imports its own code."""
    process = step._process

    def start(job: dict, arguments: argparse.Namespace, trainer: str) -> dict:
        with monkeypatch.context() as patch:
            if trainer != BESIDE:
                of_forked = SimpleNamespace(run=forked.run, TimeoutExpired=subprocess.TimeoutExpired)
                patch.setattr(step, "subprocess", of_forked)
            return process(job, arguments, trainer)

    monkeypatch.setattr(step, "_process", start)


def test_our_trainer_is_measured_and_a_missing_one_is_named(tmp_path, capfd, forked_trainers):
    assert main([*TINY, "--updates", "2", "--repeats", "1", "--trainers", "minillm", "--output", str(tmp_path)]) == 0
    header, *rows = csv.reader((tmp_path / "step.csv").open())
    assert tuple(header) == COLUMNS and len(rows) == 1
    row = dict(zip(header, rows[0], strict=True))
    assert (row["trainer"], row["student"], row["teacher"], row["ratio"]) == ("minillm", "128x2", "256x4", "")
    assert abs(float(row["tokens_per_s"]) * float(row["median_s"]) / (2 * 3) - 1) < 0.2  # both are rounded
    assert float(row["peak_mib"]) > 1
    assert "| 128x2 | 256x4 |" in (tmp_path / "step.md").read_text()


def test_the_passes_alone_are_those_of_an_update(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    forward, seen = LlamaModel.forward, []

    def noted(self, input_ids, **keys):
        seen.append((self.config.num_hidden_layers, tuple(input_ids.shape), torch.is_grad_enabled()))
        return forward(self, input_ids=input_ids, **keys)

    write_random(
        (16, 2), (16, 3), argparse.Namespace(vocab=40, seed=0, answers=2, updates=1, prompt_tokens=5), tmp_path
    )
    job = {"folder": str(tmp_path), "tokens": 3, "inner_epochs": 2, "answers": 2, "updates": 1}
    train = step_providers.passes(job)
    monkeypatch.setattr(LlamaModel, "forward", noted)
    (seconds,) = train()
    asked = [(2, (2, 5), False), (2, (2, 1), False), (2, (2, 1), False)]  # the last token is drawn, and never fed
    assert seen == [*asked, (3, (2, 8), False), *[(2, (2, 8), True)] * 2] and seconds > 0


def test_the_ratio_is_of_tokens_a_second_on_the_same_models_and_epochs():
    mine = Row(Case((8, 1), (8, 2), 4, alpha=0.2), "minillm", [1.0, 2.0, 9.0], 1, 100)
    theirs = Row(Case((8, 1), (8, 2), 4), "trl", [4.0], 1, 100)
    other = Row(Case((8, 1), (8, 2), 1), "trl", [1.0], 1, 100)
    assert _ratio(mine, [other, theirs, mine]) == "2.00"
    assert _ratio(mine, [other, mine]) == ""


def test_an_unknown_case_is_an_error(capsys):
    assert main(["--match", "nothing like this"]) == 2
    assert "256x4 from 512x8" in capsys.readouterr().err


def test_a_real_model_is_measured_beside_another_checkout(tmp_path, capfd, forked_trainers):
    """The other one here is this very checkout: its trainer runs in a process of its own all the same."""
    teacher, texts = tmp_path / "teacher", tmp_path / "texts.jsonl"
    arguments = argparse.Namespace(vocab=40, seed=0, answers=1, updates=1, prompt_tokens=2)
    (tmp_path / "made").mkdir()
    write_random((16, 2), (16, 3), arguments, tmp_path / "made")
    (tmp_path / "made" / "teacher").rename(teacher)
    texts.write_text("\n".join(json.dumps({"text": f"w{n} w{n + 1} w{n + 2}"}) for n in range(2, 30)))
    real = ["--teacher", str(teacher), "--layers", "0", "2", "--texts", str(texts), "--beside", str(ROOT)]
    small = ["--threads", "1", "--answers", "2", "--tokens", "3", "--prompt-tokens", "4", "--updates", "2"]
    options = ["--repeats", "1", "--trainers", "minillm", "--match", "alpha 0.2", "--cpu-seconds"]
    assert main([*real, *small, *options, "--output", str(tmp_path)]) == 0
    _, *rows = csv.reader((tmp_path / "step.csv").open())
    found = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    assert [(row["trainer"], row["alpha"], row["shared_coins"]) for row in found] == [
        ("minillm", "0.2", "no"),
        (BESIDE, "0.2", "no"),
        ("minillm", "0.2", "yes"),
        (BESIDE, "0.2", "yes"),
    ]
    assert {(row["student"], row["teacher"]) for row in found} == {("2 layers", "teacher")}
    assert "of the process on the CPU" in (tmp_path / "step.md").read_text()


def test_a_real_teacher_needs_the_rest_of_the_pair(tmp_path, capsys):
    assert main(["--teacher", str(tmp_path), "--layers", "0"]) == 2
    assert "--teacher needs --texts" in capsys.readouterr().err
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "w2 w3"}')
    arguments = argparse.Namespace(vocab=40, seed=0, answers=1, updates=1, prompt_tokens=2)
    write_random((16, 2), (16, 3), arguments, tmp_path)
    arguments.answers = 9
    with pytest.raises(UserError, match="too few words for 9 prompts"):
        write_real(str(tmp_path / "teacher"), [0], str(texts), arguments, tmp_path)
