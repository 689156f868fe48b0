"""Which models an engine cuts into a piece a rank."""

from minillm.config.models import TeacherConfig
from minillm.config.training import DeepSpeedEngine, TorchEngine


def shards_student(engine: TorchEngine | DeepSpeedEngine) -> bool:
    """Whether each rank will hold only a piece of every weight of the student."""
    return engine.type == "deepspeed" and engine.stage == 3


def shards_teacher(engine: TorchEngine | DeepSpeedEngine, teacher: TeacherConfig | None) -> bool:
    """The same of the teacher. What is quantised stays whole."""
    whole = teacher is None or teacher.quantization is not None
    return shards_student(engine) and not engine.replicate_teacher and not whole
