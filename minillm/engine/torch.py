"""The engine of one process: a CPU or one GPU, AdamW, a schedule of transformers, optional bfloat16 autocast."""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import get_scheduler

from minillm.config.training import DeepSpeedEngine as DeepSpeedConfig
from minillm.config.training import TorchEngine as TorchEngineConfig
from minillm.config.training import TrainConfig
from minillm.engine.base import NonFiniteError, StepResult
from minillm.engine.module import StudentLoss, to_device
from minillm.methods.base import Term
from minillm.models.pair import Models


def pick_device(name: str) -> torch.device:
    """The device that engine.device names. Raises ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"engine.device is {name!r}, but torch sees no GPU here; use engine.device=cpu")
    return device


def engine_device(engine: TorchEngineConfig | DeepSpeedConfig) -> torch.device:
    """Where the engine's models go: a rank of DeepSpeed has the GPU that its launcher counts it to."""
    if engine.type == "torch":
        return pick_device(engine.device)
    return pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


class TorchEngine:
    """See the module; the protocol is minillm.engine.base.Engine."""

    rank = 0
    world_size = 1

    def __init__(self, models: Models, train: TrainConfig, config: TorchEngineConfig, *, total_steps: int):
        self.models, self.train_config = models, train
        student = models.student.train()  # dropout is zero everywhere; checkpointing needs training mode
        if train.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.module = StudentLoss(student, models.teacher, vocab_size=models.vocab_size, backend=config.backend)
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            decay_groups(student, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
        )
        self.scheduler = get_scheduler(
            train.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(train.lr_scheduler_kwargs) or None,
        )

    def step(self, micro_batches: Sequence[Sequence[Term]]) -> StepResult:
        divisors: dict[str, float] = defaultdict(float)
        for terms in micro_batches:
            for term in terms:
                divisors[term.name] += term.count
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.models.device))
        rows: dict[str, int] = defaultdict(int)
        self.optimizer.zero_grad(set_to_none=True)
        for terms in micro_batches:
            for term in terms:
                term = to_device(term, self.models.device)
                with torch.autocast(self.models.device.type, torch.bfloat16, enabled=self.train_config.bf16):
                    loss, metrics = self.module(term)
                loss = loss * (term.weight / (divisors[term.name] or 1.0))
                loss.backward()
                sums["loss"] += loss.detach()
                sums[f"loss/{term.name}"] += loss.detach()
                rows[term.name] += len(term.batch.labels)
                for name, value in metrics.items():
                    sums[f"{term.name}:{name}"] += value
        limit = self.train_config.max_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
        result = {name: value.item() for name, value in sums.items() if ":" not in name}
        result["grad_norm"] = grad_norm.item()
        if not (math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"])):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(", ".join(f"{name} {value}" for name, value in result.items()))
        result["learning_rate"] = self.scheduler.get_last_lr()[0]
        for name, value in sums.items():
            term, _, metric = name.partition(":")
            if metric:
                result[metric] = value.item() / max(rows[term], 1)
        self.optimizer.step()
        self.scheduler.step()
        return StepResult(result, sum(rows.values()))

    def save_state(self, folder: Path) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "cpu_rng": torch.get_rng_state(),
        }
        if self.models.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.models.device)
        torch.save(state, folder / "engine.pt")

    def load_state(self, folder: Path) -> None:
        state = torch.load(folder / "engine.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["cpu_rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.models.device)


def decay_groups(student: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; biases and norms (vectors) do not."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
