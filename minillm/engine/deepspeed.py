"""The engine of several processes: DeepSpeed's ZeRO-1, 2 or 3 around the module whose forward is the loss.

Gradients are those of one process with the whole batch: divisors are summed over the ranks, and what DeepSpeed divides
by their number is multiplied by it before.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from minillm.config.deepspeed_file import read_deepspeed_file
from minillm.config.training import DeepSpeedEngine as DeepSpeedConfig
from minillm.config.training import TrainConfig
from minillm.distributed import collectives
from minillm.engine.device_copies import DeviceCopies
from minillm.engine.engine import NonFiniteError, StepResult
from minillm.engine.module import TermLoss
from minillm.engine.optimizer import make_optimizer
from minillm.engine.saved_state import check_same_shapes, check_schedule_state
from minillm.engine.step_sums import StepSums, divisors, losses, step_result
from minillm.methods.protocol import Term
from minillm.models.loading import filled, is_hollow
from minillm.models.modes import train_mode
from minillm.models.quantization import is_quantized
from minillm.models.sharded import is_sharded, name_accelerator, release
from minillm.storage.snapshot import SavedPart
from minillm.storage.state_file import reading_state, torch_file
from minillm.teachers.pair import Models
from minillm.teachers.several import members
from minillm.teachers.teacher import Teacher

# what an optimiser of DeepSpeed says of itself that is plain data of this rank
_STATES = ("optimizer_state_dict", "base_optimizer_state")


class DeepSpeedEngine:
    """See the module; the protocol is minillm.engine.engine.Engine. Every rank of the group makes one."""

    def __init__(
        self,
        models: Models,
        train: TrainConfig,
        config: DeepSpeedConfig,
        *,
        total_steps: int,
        modules: Mapping[str, nn.Module] = MappingProxyType({}),
        learning_rates: Mapping[str, float] = MappingProxyType({}),
    ):
        deepspeed = _deepspeed()
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self.models, self.trained = models, {"student": models.student, **modules}
        self.copies = DeviceCopies(models.device)
        for module in self.trained.values():
            _keep_empty_weights(module)
        trained = sum(
            one.numel() for module in self.trained.values() for one in module.parameters() if one.requires_grad
        )
        settings = engine_settings(train, config, world_size=self.world_size, trained=trained)
        if config.stage == 3 and not config.replicate_teacher:
            for teacher in members(models.teacher).values():
                self._shard_teacher(teacher, settings)
        train_mode(self.trained.values(), checkpointing=train.gradient_checkpointing)
        loss = TermLoss(models.student, modules, vocab_size=models.vocab_size, backend=config.backend)
        # made while shapes say what decays
        client, self.scheduler = make_optimizer(
            self.trained, train, total_steps=total_steps, learning_rates=learning_rates
        )
        if config.stage == 3:
            for module in self.trained.values():
                _shard(module, torch.bfloat16 if train.bf16 else torch.float32, settings, models.device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=loss, optimizer=client, config=settings)

    def _shard_teacher(self, teacher: Teacher, settings: dict[str, Any]) -> None:
        """Shard a teacher whose weights lie here, are plain, and are not trained (those go with the student's)."""
        import deepspeed

        model = teacher.model
        if model is None or is_quantized(model) or is_sharded(model) or model in self.trained.values():
            return
        frozen = {key: value for key, value in settings.items() if key not in ("gradient_clipping", "bf16")}
        zero = {key: value for key, value in frozen["zero_optimization"].items() if key != "offload_optimizer"}
        if model.dtype == torch.bfloat16:
            frozen["bf16"] = {"enabled": True}
        _shard(model, model.dtype, {**frozen, "zero_optimization": zero}, self.models.device)
        engine, *_ = deepspeed.initialize(model=model, config={**frozen, "zero_optimization": zero})
        teacher.sharded_by(engine)

    def step(self, micro_batches: Sequence[Sequence[Term]]) -> StepResult:
        terms = [term for micro_batch in micro_batches for term in micro_batch]
        divided_by = collectives.total(divisors(terms))
        sums = StepSums(self.models.device)
        for place, term in enumerate(self.copies.of(terms)):
            self.engine.set_gradient_accumulation_boundary(place == len(terms) - 1)
            loss, metrics = self.engine(term)
            loss = loss * (term.weight / (divided_by[term.name] or 1.0))
            self.engine.backward(loss * self.world_size)
            sums.add(term, loss, metrics)
        numbers = collectives.total(sums.numbers())
        if not math.isfinite(numbers["loss"]):
            raise NonFiniteError.of(losses(numbers))
        learning_rate = self.scheduler.get_last_lr()[0]
        self.engine.step()
        self._forget_gradients()
        grad_norm = float(self.engine.get_global_grad_norm())  # known once the step is taken
        if not math.isfinite(grad_norm) or not self.engine.was_step_applied():
            raise NonFiniteError.of(losses(numbers) | {"grad_norm": grad_norm})
        self.scheduler.step()
        return step_result(
            numbers, grad_norm=grad_norm, learning_rate=learning_rate, expert_tokens=self._expert_tokens()
        )

    def _expert_tokens(self) -> torch.Tensor | None:  # (layers, E) int64
        mine = self.engine.module.take_expert_tokens()
        if mine is None:
            return None
        return torch.stack([one["tokens"] for one in collectives.gather_tensors({"tokens": mine})]).sum(0)

    def _forget_gradients(self) -> None:
        """Zero the sharded gradients that ZeRO-3 keeps.

        In a step's first backward pass it overwrites those of the weights that have one there; to what a weight gets in a
        later pass it would add the step before.
        """
        kept = getattr(self.optimizer, "grad_partitions_flat_buffer", None)
        if kept is not None:
            kept.zero_()

    def state_part(self) -> SavedPart:
        """This rank's part: its share of the optimiser and of the exact weights, and its random generators."""
        return torch_file(self._state_file, self._state)

    @property
    def _state_file(self) -> str:
        return f"engine-{self.rank}-of-{self.world_size}.pt"

    def _state(self) -> dict[str, Any]:
        state = {
            "optimizer": {name: value for name, value in self.optimizer.state_dict().items() if name in _STATES},
            "weights": [part.detach().cpu().clone() for part in self._partitions()],
            "scheduler": self.scheduler.state_dict(),
            "cpu_rng": torch.get_rng_state(),
        }
        if self.models.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.models.device)
        return state

    def load_state(self, folder: Path) -> None:
        path = folder / self._state_file
        with reading_state(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            own = self.optimizer.state_dict()
            check_same_shapes(state["optimizer"], own, "optimizer")
            check_same_shapes(state["weights"], self._partitions(), "weights")
            check_schedule_state(state["scheduler"], self.scheduler)
            mine = own | state["optimizer"]
            if "fp32_flat_groups" in mine:
                mine["fp32_flat_groups"] = state["weights"]
            self.optimizer.load_state_dict([mine] * self.world_size, load_optimizer_states=True)
            for part, saved in zip(self._partitions(), state["weights"], strict=True):
                part.data.copy_(saved)
            self.scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["cpu_rng"])
            if "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], self.models.device)

    def close(self) -> None:
        release(self.engine, *self.trained.values())

    def _partitions(self) -> list[torch.Tensor]:
        """This rank's share of the weights in fp32, which the optimiser steps."""
        if hasattr(self.optimizer, "fp32_partitioned_groups_flat"):
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)


def _keep_empty_weights(model: nn.Module) -> None:
    """Make buffers of weights without elements, as a Qwen2-MoE without a shared expert has: DeepSpeed cannot gather them."""
    if is_sharded(model):
        return
    for module in model.modules():
        empty = {name: one for name, one in module.named_parameters(recurse=False) if one.numel() == 0}
        for name, parameter in empty.items():
            delattr(module, name)
            module.register_buffer(name, parameter.data)


def _shard(model: nn.Module, dtype: torch.dtype, settings: dict[str, Any], device: torch.device) -> None:
    """Shard every weight over the ranks' devices, one weight after the other, as rank 0 has it."""
    import deepspeed

    hollow = is_hollow(model)
    _keep_empty_weights(model)
    for parameter in model.parameters():
        data = parameter.data
        parameter.data = torch.empty_like(data, dtype=dtype) if hollow else data.to(dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    for buffer in model.buffers():  # rotary frequencies: DeepSpeed leaves them where they are
        buffer.data = buffer.data.to(device)
        if buffer.numel():
            deepspeed.comm.broadcast(buffer.data, 0)
    filled(model)


def engine_settings(train: TrainConfig, config: DeepSpeedConfig, *, world_size: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's own configuration: the user's file, with what minillm decides put over it.

    `trained` is how many weights of the student receive a gradient.
    """
    given = read_deepspeed_file(config.config)
    zero: dict[str, Any] = {**given.get("zero_optimization", {}), "stage": config.stage}
    for part in ("offload_optimizer", "offload_param"):
        if getattr(config, part):
            zero[part] = {**zero.get(part, {}), "device": "cpu"}
    # DeepSpeed allocates the whole bucket, 2 GB of float32 as it comes, however small the model
    bucket = zero.get("reduce_bucket_size", "auto")
    zero["reduce_bucket_size"] = min(trained, 500_000_000 if bucket == "auto" else int(bucket))
    settings = {
        **given,
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,  # minillm says itself where a step ends
        "train_batch_size": train.per_device_train_batch_size * world_size,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, which needs no compiling
        "zero_force_ds_cpu_optimizer": False,
    }
    settings["steps_per_print"] = given.get("steps_per_print", 1_000_000_000)
    if train.bf16:
        settings["bf16"] = {**given.get("bf16", {}), "enabled": True}
    return settings


def _deepspeed():
    """DeepSpeed, without the shared-memory operation that it would compile for minutes on a machine without GPU."""
    import logging

    name_accelerator()
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_init_required=False if deepspeed.comm.is_initialized() else None, verbose=False)
    return deepspeed
