"""distillation_loss: a batch of labelled text to the loss of a student beside its teacher, both models of transformers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.integrations.head_call import Placeholder, in_place_of_head, unwrapped
from minillm.losses import LMHead, linear_divergence, linear_objective

IGNORED = -100
_LABELS = ("labels", "shift_labels")


def next_token_labels(
    labels: Tensor,  # (B, L) integers, of the token at the same position, as collators give them
    position_ids: Tensor | None = None,  # (B, L), which start again at 0 with every document of a packed row
) -> Tensor:
    """The label of the next token at every position, (B, L): -100 at the last one of a row and of a document."""
    shifted = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    if position_ids is None:
        return shifted
    starts = F.pad(position_ids[..., 1:] == 0, (0, 1), value=True)
    return shifted.masked_fill(starts, IGNORED)


def targets_of(batch: Mapping[str, Any]) -> Tensor:
    """The label of the next token at every position of a batch, (B, L): its `shift_labels`, or its `labels` shifted here.

    Raises ValueError where the batch has neither.
    """
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    if batch.get("labels") is None:
        raise ValueError(
            "the batch has no labels, which say what tokens count; use a collator that makes them, such as transformers' "
            "DataCollatorForLanguageModeling(mlm=False), or set labels to input_ids, -100 where a token does not count"
        )
    position_ids = batch.get("position_ids")
    if position_ids is not None and position_ids.dim() > 2:  # of images: the first of three is the text's
        position_ids = position_ids[0]
    return next_token_labels(batch["labels"], position_ids)


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Any],
    *,
    divergence: str = "reverse_kl",
    objective: Callable[..., Any] | None = None,
    num_items: int | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The mean over a batch's counted tokens of a divergence of the student from the teacher, or of an objective. Scalar.

    No logits of either model exist in full: the loss is computed in the place of the student's head, within its own
    forward pass, which may go through DistributedDataParallel, FSDP or DeepSpeed, and through PEFT's adapters.

    Args:
        student, teacher: causal language models of transformers of one tokenizer. The teacher is in eval mode, whole on
            this rank, and a constant.
        batch: what both models take, (B, L) each: input_ids, attention_mask, position_ids, ...; and `labels` of the
            same tokens, -100 where one does not count, or `shift_labels` of the next ones.
        divergence: as linear_divergence has it.
        objective: objective(stats) as linear_objective has it, in the place of a divergence: returns a loss for each token.
        num_items: the divisor in the place of this batch's count, where a batch is split over ranks or micro-batches.
        options: those of linear_divergence (temperature, vocab_size, beta, alpha, chunk_bytes, ...), and with an
            objective its fields.

    Raises:
        ValueError: a batch without labels, a teacher in training mode, a model whose head is not known or not called
            once, and what linear_divergence and linear_objective raise.
    """
    if teacher.training:
        raise ValueError(
            "the teacher is in training mode, where dropout would change what it says; call teacher.eval()"
        )
    targets = targets_of(batch)
    inputs = {name: value for name, value in batch.items() if name not in _LABELS} | {"use_cache": False}
    teacher_hidden = _head_input(teacher, inputs)
    found: list[Tensor] = []

    def loss_of(hidden: Tensor) -> Tensor:  # (B, L, H_s) -> (B, L, 1)
        rows = hidden, LMHead.of(unwrapped(student)), teacher_hidden, LMHead.of(unwrapped(teacher))
        if objective is None:
            loss = linear_divergence(*rows, divergence=divergence, labels=targets, num_items=num_items, **options)
        else:
            total, _ = linear_objective(*rows, targets, objective, **options)
            loss = total / ((targets != IGNORED).sum().clamp(min=1) if num_items is None else num_items)
        found.append(loss)
        return Placeholder.apply(loss, hidden)

    with in_place_of_head(student, loss_of):
        output = student(**inputs)
    loss = _only(found, student)
    logits = output.logits if hasattr(output, "logits") else output[0]
    return loss + 0.0 * logits.sum()  # zeros: see Placeholder


@torch.no_grad()
def _head_input(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a model's head is applied to, (B, L, H)."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:  # (B, L, H) -> (B, L, 1)
        found.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with in_place_of_head(model, keep):
        model(**inputs)
    return _only(found, model)


def _only(found: list[Tensor], model: nn.Module) -> Tensor:
    if len(found) != 1:
        raise ValueError(
            f"{type(unwrapped(model)).__name__} calls its head {len(found)} times in a forward pass, where once was expected; "
            "call the functions of minillm.losses with hidden states and head of your own"
        )
    return found[0]
