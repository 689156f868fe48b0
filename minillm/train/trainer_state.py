"""state/trainer.json of a checkpoint: where the run stands, and under which configuration it came there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minillm import UserError
from minillm.config.root import StageConfig
from minillm.storage.checkpoint import TRAINER_STATE
from minillm.storage.snapshot import SavedPart
from minillm.storage.state_file import reading_state
from minillm.train.progress import Position, Progress


@dataclass(frozen=True)
class TrainerState:
    """The content of trainer.json."""

    progress: Progress
    config: dict[str, Any]  # of the stage
    world_size: int  # of the run that wrote it

    def position(self, stream: str, checkpoint: Path) -> Position:
        """The place in a stream. Raises UserError where the stage had no such stream."""
        with reading_state(checkpoint / TRAINER_STATE):
            return self.progress.streams[stream]


def trainer_state_part(state: TrainerState) -> SavedPart:
    """The file, a part of state/."""

    def write(content: dict[str, Any], folder: Path) -> None:
        (folder / Path(TRAINER_STATE).name).write_text(json.dumps(content, indent=1))

    return SavedPart(lambda: asdict(state), write)


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Read it back. Raises UserError, naming the file and the key, where it is not what a run writes."""
    path = checkpoint / TRAINER_STATE
    with reading_state(path):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise UserError("it is not a JSON object")
        config, world_size = content["config"], content.get("world_size", 1)
        for name in ("train", "eval"):
            if not isinstance(config, dict) or not isinstance(config.get(name), dict):
                raise UserError(f"config.{name} is not there")
        if type(world_size) is not int or world_size < 1:
            raise UserError(f"world_size is {world_size!r}, not a number of ranks")
        return TrainerState(_read_progress(content["progress"]), _with_defaults(config), world_size)


def _read_progress(content: Any) -> Progress:
    if not isinstance(content, dict):
        raise UserError("progress is not a JSON object")
    try:
        progress = Progress(**{"by_length": False, **content})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("progress", *first["loc"])))
        raise UserError(f"{where}: {first['msg']}") from None
    if progress.stage_step > progress.step:
        raise UserError(f"progress.stage_step is {progress.stage_step}, but progress.step only {progress.step}")
    progress.stage_configs = {name: _with_defaults(config) for name, config in progress.stage_configs.items()}
    return progress


def _with_defaults(config: dict) -> dict:
    """A saved configuration with the keys that have been added since, at their defaults, which change nothing, but for
    rollout.shared_coins: runs from before it drew mixtures by both models."""
    if isinstance(config.get("rollout"), dict):
        config = {**config, "rollout": {"shared_coins": False, **config["rollout"]}}
    try:
        return StageConfig.model_validate(config).model_dump(mode="json")
    except ValidationError:  # of another version: its differences are shown as they are
        return config
