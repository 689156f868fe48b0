"""The whole configuration of one stage, and what must hold between its groups."""

from typing import Any

from pydantic import Field

from minillm.config.base import Strict
from minillm.config.data import DataConfig
from minillm.config.evaluation import EvalConfig
from minillm.config.method import Method
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.config.rollout import RolloutConfig
from minillm.config.training import LogConfig, SaveConfig, TorchEngine, TrainConfig


class StageConfig(Strict):
    """One training run: the student it starts from, the method, and everything around it."""

    output_dir: str
    seed: int = 0
    student: StudentConfig
    teacher: TeacherConfig | None = None
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    method: Method
    train: TrainConfig
    engine: TorchEngine = TorchEngine()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()


class FileConfig(StageConfig):
    """What a YAML file may hold: a stage, or what its stages share and the stages themselves."""

    stages: dict[str, dict[str, Any]] = Field(
        {}, description="Stages by name, run in order; each is merged over the rest of the file"
    )
