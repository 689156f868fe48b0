"""The files of a run's folder, read back for the report and the model card: its stages with their records."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minillm import UserError
from minillm.config.loader.stages import stage_documents
from minillm.storage.checkpoint import TRAINER_STATE, list_checkpoints
from minillm.storage.metrics_log import METRICS, SAMPLES, read_numbers, read_records

PREPARED = "prepared.json"  # in the folder that a stage without steps has left, below stages/


@dataclass(frozen=True)
class Measurement:
    """One evaluation record."""

    stage: str
    stage_step: int
    seconds: float  # of training, in this stage
    mean: dict[str, float]  # over the sets
    sets: dict[str, dict[str, float]]
    took_seconds: float = 0.0  # the evaluation itself

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Measurement":
        return cls(
            stage=record["stage"],
            stage_step=record["stage_step"],
            seconds=record["seconds"],
            mean=read_numbers(record["mean"]),
            sets={name: read_numbers(metrics) for name, metrics in record["sets"].items()},
            took_seconds=record.get("time/evaluation_s", 0.0),
        )


@dataclass(frozen=True)
class StageFiles:
    """One stage: its keys, and its records in order."""

    name: str
    settings: dict[str, Any]  # as the run itself resolved them; of a stage without a checkpoint, as they were written
    train: list[dict[str, Any]]
    evaluations: list[Measurement]  # of the student

    @property
    def started(self) -> bool:
        return bool(self.train or self.evaluations)

    @property
    def parent(self) -> str | None:
        """The stage whose model this one's student was."""
        path = self.settings.get("student", {}).get("path") or ""
        return path.removeprefix("stage:") if path.startswith("stage:") else None

    @property
    def lora(self) -> dict[str, Any] | None:
        """The settings of the adapters that were trained in the place of the weights."""
        return self.settings.get("student", {}).get("lora")

    @property
    def timed_by(self) -> str | None:
        """The stage whose training time this one was given."""
        limit = self.settings.get("train", {}).get("max_seconds")
        return limit.removeprefix("stage:") if isinstance(limit, str) else None

    @property
    def steps(self) -> int:
        return self.train[-1]["stage_step"] if self.train else 0

    @property
    def seconds(self) -> float:
        return self.train[-1]["seconds"] if self.train else 0.0

    @property
    def tokens(self) -> int:
        return self.train[-1]["student_tokens"] if self.train else 0


@dataclass(frozen=True)
class RunFiles:
    """The content of a run's folder. Whatever is not there yet is empty."""

    folder: Path
    document: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, StageFiles]  # in the order they run
    teachers: dict[str, Measurement]  # stage -> the last evaluation of its teacher
    samples: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        return (self.folder / "final").is_dir()

    def before(self, stage: StageFiles) -> Measurement | None:
        """Find the evaluation of the student that the stage started from."""
        if stage.evaluations and stage.evaluations[0].stage_step == 0:
            return stage.evaluations[0]
        parent = self.stages.get(stage.parent or "")
        return parent.evaluations[-1] if parent and parent.evaluations else None

    def lineage(self, stage: StageFiles) -> list[StageFiles]:
        """List the stages that this one's student went through before it, the first one first."""
        parent = self.stages.get(stage.parent or "")
        return [] if parent is None or parent is stage else [*self.lineage(parent), parent]


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder, however far the run is.

    Raises UserError where it is not one, or where a file in it cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").exists() and not (folder / METRICS).exists():
        raise UserError(f"{folder} is not a run's folder: it has neither config.yaml nor {METRICS}")
    document, environment = _read(folder / "config.yaml", yaml.safe_load), _read(folder / "env.json", json.loads)
    records = read_records(folder / METRICS)
    settings = stage_documents(document) if document else {}
    resolved = _resolved_settings(folder)
    settings = {name: resolved.get(name, written) for name, written in settings.items()}
    # records of a stage that config.yaml does not have are shown all the same
    names = dict.fromkeys([*settings, *(record["stage"] for record in records)])
    evaluations = [record for record in records if record["kind"] == "eval"]
    stages = {
        name: StageFiles(
            name,
            settings.get(name, {}),
            [record for record in records if record["stage"] == name and record["kind"] == "train"],
            [
                Measurement.read(record)
                for record in evaluations
                if record["stage"] == name and record["who"] == "student"
            ],
        )
        for name in names
    }
    teachers = {record["stage"]: Measurement.read(record) for record in evaluations if record["who"] == "teacher"}
    return RunFiles(folder, document, environment, stages, teachers, read_records(folder / SAMPLES))


def _resolved_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """All keys of the stages that the newest checkpoint knows, with the defaults of the version that wrote it."""
    for _, checkpoint in reversed(list_checkpoints(folder)):
        try:
            state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
            progress = state["progress"]
            return {**progress["stage_configs"], progress["stage"]: state["config"]}
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or of another version: the one before may do
            continue
    return {}


def stage_label(label: str, run: RunFiles, stage: StageFiles) -> str:
    """Name a stage beside those of other runs."""
    return label if len(run.stages) == 1 else f"{label}: {stage.name}"


def _read(path: Path, parse) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold keys and values")
    return content
