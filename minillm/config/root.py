"""The whole configuration of one stage. A file holds one, or what its stages share and the `stages` themselves."""

from typing import Annotated

from pydantic import Field

from minillm.config.data import DataConfig
from minillm.config.evaluation import EvalConfig
from minillm.config.keys import FolderPath, Strict
from minillm.config.method import Method
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.config.rollout import RolloutConfig
from minillm.config.training import Engine, LogConfig, SaveConfig, TorchEngine, TrainConfig


class StageConfig(Strict):
    """One training run: the student it starts from, the method, and everything around it."""

    output_dir: FolderPath = Field(description="Where everything that the run writes goes")
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Of the order of the data, of sampling and of fresh weights"
    )
    student: StudentConfig
    teacher: TeacherConfig | None = None
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    method: Method
    train: TrainConfig
    engine: Engine = TorchEngine()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()


# What all stages of a file share, so that a stage cannot say it for itself.
OF_THE_RUN = ("output_dir", "log.report_to")
