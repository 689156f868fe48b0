"""The divergence of two models whose logits are standardised row by row, of LLAVADI's released code, without full logits."""

import torch
from torch import Tensor

from minillm.losses import LMHead, TokenStats, linear_objective
from minillm.models.standardized_logits import standardized, sums_of_standardized


def standardized_divergence(
    hidden: Tensor,  # (N, H_s)
    head: LMHead,
    teacher_hidden: Tensor,  # (N, H_t)
    teacher_head: LMHead,
    *,
    weights: Tensor,  # (N,)
    answers: Tensor,  # (N,) bool
    divergence: str,
    vocab_size: int,
    options: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the rows' divergences, and that of the answers' rows for the records.

    Differentiable with respect to `hidden` and the weight of `head`, also through the deviations. Ids above `vocab_size`,
    and those that a head gives no probability, are not among a row's logits.
    Raises UserError for heads that do more to their logits than one factor.
    """
    with torch.no_grad():
        target = standardized(teacher_hidden, teacher_head, vocab_size)

    def objective(stats: TokenStats, weights: Tensor, answers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # (C,) each
        distance = getattr(stats, divergence)
        return weights * distance, {"answers": torch.where(answers, distance.detach(), 0.0)}

    def sums(scaled: Tensor, own: LMHead) -> tuple[Tensor, Tensor]:
        total, metrics = linear_objective(
            scaled,
            own,
            target,
            teacher_head,
            None,
            objective,
            inputs={"weights": weights, "answers": answers},
            fields=(divergence,),
            vocab_size=vocab_size,
            **options,
        )
        return total, metrics["answers"]

    total, of_answers = sums_of_standardized(hidden, head, vocab_size, sums)
    return total, {f"standardized_{divergence}_nats": of_answers}
