"""One protocol (base.py); the engine that a configuration names."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from minillm.config.root import StageConfig
from minillm.engine.engine import Engine
from minillm.engine.torch import TorchEngine
from minillm.teachers.pair import Models


def build_engine(
    config: StageConfig,
    models: Models,
    *,
    total_steps: int,
    modules: Mapping[str, nn.Module] = MappingProxyType({}),
    learning_rates: Mapping[str, float] = MappingProxyType({}),
) -> Engine:
    """The engine of `config.engine.type`, which trains the student of `models` and the `modules` beside it."""
    options = {"total_steps": total_steps, "modules": modules, "learning_rates": learning_rates}
    if config.engine.type == "deepspeed":
        from minillm.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(models, config.train, config.engine, **options)
    return TorchEngine(models, config.train, config.engine, **options)
