"""One protocol (base.py); the engine that a configuration names."""

from minillm.config.root import StageConfig
from minillm.engine.engine import Engine
from minillm.engine.torch import TorchEngine
from minillm.models.pair import Models


def build_engine(config: StageConfig, models: Models, *, total_steps: int) -> Engine:
    """The engine of `config.engine.type`, with the student of `models` to train."""
    if config.engine.type == "deepspeed":
        from minillm.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(models, config.train, config.engine, total_steps=total_steps)
    return TorchEngine(models, config.train, config.engine, total_steps=total_steps)
