"""Runs that nobody trained: their files, written as the trainer writes them."""

import json
import re
from pathlib import Path

import yaml

from minillm.config.root import StageConfig
from minillm.reporting.report import write_report
from minillm.storage.checkpoint import TRAINER_STATE
from minillm.storage.metrics_log import MetricsLog

DOCUMENT = {
    "output_dir": "runs/x",
    "student": {"path": "models/small"},
    "teacher": {"path": "models/large"},
    "method": {"name": "minillm"},
    "train": {"max_steps": 4},
    "eval": {"sets": {"dolly": {"path": "d.jsonl"}}},
}
ARMS = {
    **DOCUMENT,
    "stages": {
        "warmup": {"method": {"name": "sft"}, "train": {"max_steps": 2}},
        "minillm": {"student": {"path": "stage:warmup"}},
        "kd": {
            "student": {"path": "stage:warmup"},
            "method": {"name": "kd"},
            "train": {"max_steps": None, "max_seconds": "stage:minillm"},
        },
    },
}


class Run:
    """Writes a run's files as the trainer does."""

    def __init__(self, folder: Path, document: dict):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        self.folder, self.log, self.step = folder, MetricsLog(folder), 0

    def train(self, stage: str, steps: int, *, seconds: float = 1.0, **values) -> None:
        for stage_step in range(1, steps + 1):
            self.step += 1
            self.log.write(
                {"kind": "train", "stage": stage, "step": self.step, "stage_step": stage_step,
                 "seconds": seconds * stage_step, "student_tokens": 100 * stage_step, "loss": 2.0, **values}
            )  # fmt: skip

    def evaluate(self, stage: str, stage_step: int, *, seconds: float = 0.0, who: str = "student", **metrics) -> None:
        self.log.write(
            {"kind": "eval", "stage": stage, "step": self.step, "stage_step": stage_step, "seconds": seconds,
             "student_tokens": 0, "who": who, "sets": {"dolly": metrics}, "mean": metrics}
        )  # fmt: skip

    def sample(self, stage: str, answer: str, **values) -> None:
        self.log.sample(
            {"stage": stage, "step": self.step, "set": "dolly", "index": 0, "prompt": "What?", "answer": answer,
             "length_tokens": 3, "ended": True, **values}
        )  # fmt: skip

    def checkpoint(self, stage: str, finished: dict[str, dict] | None = None, **changed) -> None:
        """What a checkpoint says of the configuration, with some groups as another version had them."""
        folder = self.folder / f"checkpoint-{self.step}"
        (folder / TRAINER_STATE).parent.mkdir(parents=True)
        progress = {"stage": stage, "stage_configs": finished or {}}
        (folder / TRAINER_STATE).write_text(json.dumps({"progress": progress, "config": resolved(**changed)}))

    def report(self) -> str:
        return write_report(self.folder).read_text()


def resolved(**changed: dict) -> dict:
    """All keys of DOCUMENT, as a checkpoint has them, with some of some groups changed."""
    keys = StageConfig.model_validate(DOCUMENT).model_dump(mode="json")
    return {**keys, **{group: {**keys[group], **values} for group, values in changed.items()}}


def arms(folder: Path, **document) -> Run:
    """Two stages of equal time from the same student."""
    run = Run(folder, {**ARMS, **document})
    run.evaluate("warmup", 0, reverse_kl_nats=3.5, forward_kl_nats=2.5, entropy_nats=3.0, rouge_l=8.0, ended_share=0.5)
    run.evaluate("warmup", 0, who="teacher", rouge_l=27.6, entropy_nats=1.2)
    run.train("warmup", 2)
    run.evaluate("warmup", 2, seconds=2.0, reverse_kl_nats=1.6, forward_kl_nats=1.3, entropy_nats=2.0, rouge_l=18.0)
    run.train("minillm", 4, seconds=30.0)
    run.evaluate("minillm", 4, seconds=120.0, reverse_kl_nats=0.5, forward_kl_nats=1.25, entropy_nats=1.5, rouge_l=21.0)
    run.train("kd", 12, seconds=10.0)
    run.evaluate("kd", 12, seconds=120.0, reverse_kl_nats=0.8, forward_kl_nats=1.0, entropy_nats=1.9, rouge_l=19.5)
    return run


def rows(report: str, heading: str = "## Evaluation") -> dict[str, dict[str, str]]:
    """The first table after a heading, as {row: {column: cell}}."""
    section = report.split(f"{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE).group().splitlines()
    header, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in body}
