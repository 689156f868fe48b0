"""The whole configuration of one stage. A file holds one of these, or the keys that its stages share and `stages`."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import Field, ValidationError

from minillm.config.data import DataConfig
from minillm.config.evaluation import EvalConfig
from minillm.config.keys import FolderPath, Seed, Strict
from minillm.config.method import MethodConfig
from minillm.config.methods import Method
from minillm.config.models import (
    SeveralTeachersConfig,
    StudentConfig,
    Teacher,
    TeachersByConfig,
    TeacherSide,
)
from minillm.config.rollout import RolloutConfig
from minillm.config.shape import Group
from minillm.config.training import Engine, LogConfig, SaveConfig, TorchEngine, TrainConfig


class StageConfig(Strict):
    """One training run: the student it starts from, the method, and everything around it."""

    output_dir: FolderPath = Field(description="The folder of everything that the run writes")
    seed: Seed = Field(0, description="Seed of the order of the data, of sampling and of fresh weights")
    student: StudentConfig
    teacher: Teacher | None = None
    teachers: dict[str, Teacher] = Field({}, description="Several teachers by name, in the place of `teacher`")
    teachers_by: TeachersByConfig | None = Field(None, description="The way in which `teachers` divide the records")
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    method: Method
    train: TrainConfig
    engine: Engine = TorchEngine()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()

    @property
    def teacher_side(self) -> TeacherSide | None:
        """The judge of the student: `teacher`, or `teachers` taken together."""
        if not self.teachers:
            return self.teacher
        return SeveralTeachersConfig(teachers=self.teachers, by=self.teachers_by)

    @property
    def student_side(self) -> StudentConfig:
        """The model beside the teacher: the student, or the reference model of a method that has one, read as the teacher is."""
        reference = self.method.needs().reference
        if reference is None:
            return self.student
        teacher = self.teacher
        return StudentConfig(
            path=reference,
            dtype=teacher.dtype,
            attn_implementation=teacher.attn_implementation,
            trust_remote_code=teacher.trust_remote_code,
        )


STAGE_SHAPE = Group(StageConfig)

# Keys of the whole run, which no stage can set for itself.
OF_THE_RUN = ("output_dir", "log.report_to")


def register_method(config_class: type[MethodConfig]) -> None:
    """Let `method.name` name a method that is defined elsewhere. minillm.methods.register calls this.

    Raises ValueError for a name that is taken by another class.
    """
    name, known = _name_of(config_class), method_classes()
    if known.get(name, config_class) is not config_class:
        raise ValueError(
            f"method.name {name!r} is {known[name].__qualname__} already; give {config_class.__qualname__} another"
        )
    field = StageConfig.model_fields["method"]
    field.annotation = field.annotation | config_class
    StageConfig.model_rebuild(force=True)


def _name_of(config_class: type[MethodConfig]) -> str:
    (name,) = get_args(config_class.model_fields["name"].annotation)
    return name


def described_method(settings: Mapping[str, Any]) -> tuple[str, bool]:
    """The summary of a method for people, and whether it has a teacher, from the keys that a run wrote.

    A method that is not known here is called by its name, and a teacher of its stage is believed to be used.
    """
    name = str(settings.get("name", ""))
    config_class = method_class(name)
    if config_class is None:
        return name, True
    try:
        return config_class.summary, config_class.model_validate(settings).needs().teacher
    except ValidationError:  # keys of another version
        return config_class.summary, True


def method_class(name: str) -> type[MethodConfig] | None:
    """The keys of a method by its name, None where it is not known here."""
    return method_classes().get(name)


def method_classes() -> dict[str, type[MethodConfig]]:
    """The keys of every method that is known here, by its name."""
    return {_name_of(one): one for one in get_args(StageConfig.model_fields["method"].annotation)}
