"""The engine of one process: a CPU or one GPU, AdamW, a schedule of transformers, optional bfloat16 autocast."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from minillm.config.training import TorchEngine as TorchEngineConfig
from minillm.config.training import TrainConfig
from minillm.engine.device_copies import DeviceCopies
from minillm.engine.engine import NonFiniteError, StepResult
from minillm.engine.module import TermLoss
from minillm.engine.optimizer import make_optimizer
from minillm.engine.saved_state import check_optimizer_state, check_schedule_state
from minillm.engine.step_sums import StepSums, divisors, losses, step_result
from minillm.methods.protocol import Term
from minillm.models.modes import train_mode
from minillm.storage.snapshot import SavedPart
from minillm.storage.state_file import reading_state, torch_file
from minillm.teachers.pair import Models

STATE = "engine.pt"


class TorchEngine:
    """See the module; the protocol is minillm.engine.engine.Engine."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        models: Models,
        train: TrainConfig,
        config: TorchEngineConfig,
        *,
        total_steps: int,
        modules: Mapping[str, nn.Module] = MappingProxyType({}),
        learning_rates: Mapping[str, float] = MappingProxyType({}),
    ):
        self.models, self.train_config = models, train
        student = models.student
        train_mode((student, *modules.values()), checkpointing=train.gradient_checkpointing)
        self.module = TermLoss(student, modules, vocab_size=models.vocab_size, backend=config.backend)
        self.copies = DeviceCopies(models.device, self.module.device_of)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer, self.scheduler = make_optimizer(
            {"student": student, **modules}, train, total_steps=total_steps, learning_rates=learning_rates
        )

    def step(self, micro_batches: Sequence[Sequence[Term]]) -> StepResult:
        terms = [term for micro_batch in micro_batches for term in micro_batch]
        divided_by = divisors(terms)
        sums = StepSums(self.models.device)
        for term in self.copies.of(terms):
            device = self.module.device_of(term)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.train_config.bf16):
                loss, metrics = self.module(term)
            loss = loss * (term.weight / (divided_by[term.name] or 1.0))
            loss.backward()
            sums.add(term, loss, metrics)
        limit = self.train_config.max_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit).item()
        numbers = sums.numbers()
        if not (math.isfinite(numbers["loss"]) and math.isfinite(grad_norm)):
            raise NonFiniteError.of(losses(numbers) | {"grad_norm": grad_norm})
        result = step_result(
            numbers,
            grad_norm=grad_norm,
            learning_rate=self.scheduler.get_last_lr()[0],
            expert_tokens=self.module.take_expert_tokens(),
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # now, so that the next rollouts have their memory
        self.scheduler.step()
        return result

    def state_part(self) -> SavedPart:
        return torch_file(STATE, self._state)

    def _state(self) -> dict[str, Any]:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "cpu_rng": torch.get_rng_state(),
        }
        if self.models.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.models.device)
        return state

    def load_state(self, folder: Path) -> None:
        path = folder / STATE
        with reading_state(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            check_optimizer_state(state["optimizer"], self.optimizer)
            check_schedule_state(state["scheduler"], self.scheduler)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["cpu_rng"])
            if "cuda_rng" in state and self.models.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.models.device)

    def close(self) -> None:
        """Do nothing: no one else holds them, and they go with the engine and its models."""
