"""Folders of an experiment that nobody ran: evaluations and records as measuring and training write them."""

import json
from pathlib import Path

from minillm.experiment.experiment_file import Experiment
from minillm.experiment.jobs import FINAL, folder_of
from minillm.experiment.measuring import EVALUATION, TEACHERS
from minillm.storage.metrics_log import METRICS


class Folders:
    """Writes what an experiment's runs leave."""

    def __init__(self, experiment: Experiment, output: Path):
        self.experiment, self.output = experiment, output

    def measured(self, arm: str, seed: int, *, teacher: str | None = None, sample: str = "", **metrics: float) -> None:
        samples = [{"set": "held_out", "index": 0, "prompt": "Why?", "answer": sample, "ended": True}] if sample else []
        content = {"sets": {"held_out": metrics}, "mean": metrics, "samples": samples, "teacher": teacher, "curves": {}}
        self._write(folder_of(self.output, seed, arm) / EVALUATION, json.dumps(content))

    def teacher(self, name: str, **metrics: float) -> None:
        content = {"sets": {"held_out": metrics}, "mean": metrics, "samples": [], "curves": {}}
        self._write(self.output / TEACHERS / name / EVALUATION, json.dumps(content))

    def trained(self, name: str, seed: int, *, seconds: float, evaluations: dict[int, float] | None = None) -> None:
        """A finished run of 200 tokens, with `loss_nats` measured at some numbers of tokens."""
        records = [
            {"kind": "eval", "who": "student", "stage": name, "stage_step": 0, "seconds": tokens / 100,
             "student_tokens": tokens, "sets": {}, "mean": {"loss_nats": value}}
            for tokens, value in (evaluations or {}).items()
        ]  # fmt: skip
        records.append({"kind": "train", "stage": name, "stage_step": 2, "seconds": seconds, "student_tokens": 200})
        folder = folder_of(self.output, seed, name)
        self._write(folder / METRICS, "".join(json.dumps(record) + "\n" for record in records))
        (folder / FINAL).mkdir()

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
