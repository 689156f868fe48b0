"""Calls of the public door, for `make types`: what they return, and that wrong ones are found. Nothing runs this file."""

from typing import assert_type

from torch import Tensor, nn

from minillm.integrations import DistillationMixin, HFDistillationTrainer, distillation_loss, next_token_labels
from minillm.losses import (
    LMHead,
    TokenStats,
    TopK,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_objective,
    linear_token_stats,
)


def objective(stats: TokenStats, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return stats.reverse_kl - advantages * stats.student_logprob, {"entropy": stats.student_entropy}


def right(hidden: Tensor, weight: Tensor, labels: Tensor, model: nn.Module) -> None:
    """Every function, with bare weights, heads, sums of heads and a teacher that is known by its likeliest ids."""
    head = LMHead(weight, bias=None, logit_scale=0.5, softcap=30.0)
    rows = hidden, head, hidden, weight
    assert_type(linear_logprobs(hidden, head, labels, temperature=2.0), Tensor)
    assert_type(linear_cross_entropy((hidden, hidden), LMHead.sum_of(head, weight), labels, num_items=3), Tensor)
    assert_type(linear_divergence(*rows, divergence="jsd", beta=0.3, labels=labels, vocab_size=10), Tensor)
    assert_type(linear_divergence(hidden, weight, TopK(labels, hidden), None, reduction="none"), Tensor)
    assert_type(linear_token_stats(*rows, labels, fields=("reverse_kl",), weight_grad="bf16"), TokenStats)
    found = linear_objective(*rows, labels, objective, inputs={"advantages": hidden}, coupled=True, chunk_bytes=2**20)
    assert_type(found, tuple[Tensor, dict[str, Tensor]])
    assert_type(LMHead.of(model, check=True), LMHead)
    assert_type(distillation_loss(model, model, {"labels": labels}, divergence="forward_kl"), Tensor)
    assert_type(next_token_labels(labels, position_ids=labels), Tensor)
    trainer: DistillationMixin = HFDistillationTrainer(teacher=model, loss_options={"temperature": 2.0})
    assert_type(trainer.teacher, nn.Module)


def wrong(hidden: Tensor, weight: Tensor, labels: Tensor, model: nn.Module) -> None:
    """One mistake a line; mypy says where an `ignore` is not needed."""
    linear_divergence(hidden, weight, hidden, weight, temprature=2.0)  # type: ignore[call-arg]
    linear_divergence(hidden, weight, hidden, weight, beta="0.5")  # type: ignore[arg-type]
    linear_divergence(hidden, weight, 3, None)  # type: ignore[arg-type]
    linear_logprobs(hidden, weight)  # type: ignore[call-arg]
    linear_cross_entropy(hidden, weight, labels, beta=0.5)  # type: ignore[call-arg]
    linear_objective(hidden, weight, hidden, weight, labels, "reverse_kl")  # type: ignore[arg-type]
    LMHead.of("Qwen/Qwen3-0.6B")  # type: ignore[arg-type]
    distillation_loss(model, model, {"labels": labels}, "forward_kl")  # type: ignore[call-arg]
    HFDistillationTrainer(model)  # type: ignore[call-arg]
