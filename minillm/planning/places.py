"""The devices of a plan: the student's, which has no name, and others that hold a teacher whose `device` says so."""

import torch

from minillm.config.models import AnyTeacherConfig, TeacherConfig
from minillm.config.training import DeepSpeedEngine, TorchEngine
from minillm.models.device import same_device

HOME = ""  # the student's device
HOST = "cpu"


def place_of(teacher: AnyTeacherConfig | None, engine: TorchEngine | DeepSpeedEngine, kind: str) -> str:
    """The device of a teacher's weights, HOME where it is the student's.

    Args: kind: cuda where the student is on a GPU, or cpu.
    """
    if not isinstance(teacher, TeacherConfig) or teacher.device is None or engine.type != "torch":
        return HOME
    named = engine.device if engine.device.startswith(kind) else kind
    where, there = torch.device(teacher.device), torch.device(named)
    if same_device(where, there):
        return HOME
    return HOST if where.type == "cpu" else f"{where.type}:{where.index or 0}"


def kind_of(place: str, home: torch.device) -> torch.device:
    """The kind of device that a place is."""
    return home if place == HOME else torch.device(place.partition(":")[0])
