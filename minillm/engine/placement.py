"""The devices that an engine's models live on, and those that they are read to first."""

import os

import torch

from minillm import UserError
from minillm.config.models import TeacherConfig, teachers_of
from minillm.config.root import StageConfig
from minillm.config.training import DeepSpeedEngine, TorchEngine
from minillm.distributed.launcher import launched_local_rank
from minillm.models.device import pick_device


def engine_device(engine: TorchEngine | DeepSpeedEngine) -> torch.device:
    """The device of the engine's models: a rank of DeepSpeed has the GPU that its launcher counts it to."""
    if engine.type == "torch":
        return pick_device(engine.device)
    return pick_device(f"cuda:{launched_local_rank()}" if torch.cuda.is_available() else "cpu")


def check_devices(config: StageConfig) -> None:
    """Raises UserError, which names the key, for a device of a stage that is not there, the student's or a teacher's."""
    engine_device(config.engine)
    for key, teacher in teachers_of(config.teacher_side).items():
        if isinstance(teacher, TeacherConfig) and teacher.device is not None:
            pick_device(teacher.device, f"{key}.device")


def check_backend(engine: TorchEngine | DeepSpeedEngine, device: torch.device) -> None:
    """Raises UserError for a backend of the losses that the device cannot run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if engine.backend == "triton" and device.type != "cuda" and not interpreted:
        raise UserError(
            f"engine.backend is triton, which needs a GPU, and the models are on the {device.type}; use auto"
        )


def loading_device(engine: TorchEngine | DeepSpeedEngine, *, sharded: bool) -> torch.device:
    """The device that a model is read to: one that will be sharded to the host, from which each rank's device gets its shard."""
    return torch.device("cpu") if sharded else engine_device(engine)
