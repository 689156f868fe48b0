"""Shards of one rank: ZeRO's stages, offloading, a sharded teacher.

Sizes that DeepSpeed chooses by itself are its documented defaults; a user's own DeepSpeed JSON is read for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minillm import UserError
from minillm.config.deepspeed_file import read_deepspeed_file
from minillm.config.root import StageConfig
from minillm.config.training import shards_teacher
from minillm.planning.sizes import ModelSize

# DeepSpeed's defaults, in elements
DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "allgather_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_max_live_parameters": 1e9,
}


@dataclass(frozen=True)
class Sharding:
    """The place of each part of the memory. Stage 0 is without DeepSpeed: one process, or ranks that train
    nothing."""

    world_size: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    teacher: str = "replicated"  # sharded | replicated | offloaded
    by_layers: bool = False  # sharded weights are gathered layer by layer even to sample and score
    zero: Mapping[str, Any] = field(default_factory=dict)  # DeepSpeed's `zero_optimization`

    @property
    def states_shard(self) -> float:
        """The fraction of the optimiser that a rank has, wherever it lies."""
        return 1.0 / self.world_size if self.stage >= 1 else 1.0

    def factors(self) -> dict[str, float]:
        """Return the fraction of each part that stays on the device of one rank."""
        shard = 1.0 / self.world_size
        states = 0.0 if self.offload_optimizer else self.states_shard
        weights = 0.0 if self.offload_param else shard if self.stage == 3 else 1.0
        teacher = {"sharded": shard, "replicated": 1.0, "offloaded": 0.0}[self.teacher]
        return {
            "student weights": weights,
            "teacher weights": teacher,
            "gradients": (0.0 if self.offload_optimizer else shard) if self.stage >= 2 else 1.0,
            "optimizer states": states,
            "fp32 master weights": states,
        }

    def host_factors(self) -> dict[str, float]:
        """Return the fraction of each part that a rank keeps in its host's memory because it is offloaded."""
        shard = 1.0 / self.world_size
        states = shard if self.offload_optimizer else 0.0
        return {
            "student weights": shard if self.offload_param else 0.0,
            "teacher weights": shard if self.teacher == "offloaded" else 0.0,
            "gradients": states,
            "optimizer states": states,
            "fp32 master weights": states,
        }

    def is_sharded(self, who: str) -> bool:
        """True where a rank holds no more than a shard of the student or teacher."""
        return self.stage == 3 if who == "student" else self.teacher != "replicated"

    def gathers(self, who: str) -> bool:
        """True where its weights must be gathered before they are used."""
        return self.is_sharded(who) and (self.world_size > 1 or self.offload_param)

    def layers(self, size: ModelSize) -> int:
        """Return the bytes of a sharded model that are gathered at a time where it runs layer by layer: no more than are
        allowed to live and be prefetched, no less than the largest module has."""
        live = self._size("stage3_max_live_parameters") + self._size("stage3_prefetch_bucket_size")
        return min(size.parameters, max(size.largest_layer, size.head, int(live))) * size.itemsize

    def buckets(self, trained: int, itemsize: int) -> int:
        """Return the bytes of the buffers in which gradients travel. Stage 3 sorts a full one by ranks, in a second one."""
        if not self.stage:
            return 0
        return int(min(trained, self._size("reduce_bucket_size"))) * itemsize * (2 if self.stage == 3 else 1)

    def _size(self, name: str) -> float:
        value = self.zero.get(name, DEFAULTS[name])
        return DEFAULTS[name] if value == "auto" else float(value)


def sharding_of(config: StageConfig, world_size: int) -> Sharding:
    """Read the sharding of a stage from `engine`. Raises UserError for several ranks of the torch engine."""
    engine = config.engine
    if engine.type == "torch":
        if world_size > 1:
            raise UserError(f"engine.type torch is one process, not {world_size}; plan with engine.type=deepspeed")
        return Sharding()
    if not config.method.needs().takes_steps:  # no engine is made, and every rank has the models whole
        return Sharding(world_size=world_size)
    sharded = shards_teacher(engine, config.teacher_side)
    return Sharding(
        world_size=world_size,
        stage=engine.stage,
        offload_optimizer=engine.offload_optimizer,
        offload_param=engine.offload_param,
        by_layers=engine.gather == "layers",
        teacher="offloaded" if sharded and engine.offload_param else "sharded" if sharded else "replicated",
        zero=read_deepspeed_file(engine.config).get("zero_optimization", {}),
    )
