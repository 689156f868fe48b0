"""The sums over the terms of a step, and what is reported of them: the same numbers whichever engine adds them up."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from minillm.engine.engine import StepResult
from minillm.methods.protocol import Term
from minillm.models.device import moved


def divisors(terms: Iterable[Term]) -> dict[str, float]:
    """The sum of the counts of each term, by its name."""
    sums: dict[str, float] = defaultdict(float)
    for term in terms:
        sums[term.name] += term.count
    return dict(sums)


class StepSums:
    """Sums over the terms and micro-batches of a step on one rank; sums of these over ranks are those of the step."""

    def __init__(self, device: torch.device):
        self._device = device
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        self._rows: dict[str, int] = defaultdict(int)

    def add(self, term: Term, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:  # () each
        """A term's weighted loss, already divided, and its metrics summed over rows, from wherever its model is."""
        loss = moved(loss.detach(), self._device)
        self._sums["loss"] += loss
        self._sums[f"loss/{term.name}"] += loss
        self._rows[f":{term.name}"] += term.batch.tokens
        self._rows[":"] += term.batch.tokens if term.trains == "student" else 0
        for name, value in metrics.items():
            self._sums[f"{term.name}:{name}"] += moved(value, self._device)

    def numbers(self) -> dict[str, float]:
        """The losses by name, `TERM:METRIC`, `:TERM` for its rows, and `:` for those of all terms that train the student."""
        return {name: value.item() for name, value in self._sums.items()} | self._rows


def losses(numbers: Mapping[str, float]) -> dict[str, float]:
    """`loss` and `loss/TERM`."""
    return {name: value for name, value in numbers.items() if ":" not in name}


def step_result(
    numbers: Mapping[str, float],
    *,
    grad_norm: float,
    learning_rate: float,
    expert_tokens: Tensor | None = None,  # (layers, E) int64, over all ranks
) -> StepResult:
    """The losses, and the means of the metrics over their term's rows; of the auxiliary loss the mean over its terms."""
    metrics = losses(numbers) | {"grad_norm": grad_norm, "learning_rate": learning_rate}
    for name, value in numbers.items():
        term, _, metric = name.partition(":")
        if term and metric:
            metrics[metric] = value / max(numbers[f":{term}"], 1)
    balances = [
        value / max(numbers[f":{name.partition(':')[0]}"], 1)
        for name, value in numbers.items()
        if name.endswith(":auxiliary_loss")
    ]
    if balances:
        metrics["auxiliary_loss"] = sum(balances) / len(balances)
    return StepResult(metrics, int(numbers.get(":", 0)), [] if expert_tokens is None else expert_tokens.tolist())
