"""What the tests of a TopK teacher share: a case of `conftest` whose teacher is known by k ids, and its oracle."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.kernels import reference
from minillm.losses import TopK

FIELDS = (
    "student_logprob",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "interpolated_cross_entropy",
)  # all of them differentiable
DIVERGENCES = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "interpolated_cross_entropy",
)


@dataclass
class SparseCase:
    """Inputs of a fused loss, as `conftest.Case` has them, and a TopK in the place of the teacher's hidden states."""

    case: object
    top_k: TopK

    def __getattr__(self, name):
        if name == "case":
            raise AttributeError(name)
        return getattr(self.case, name)

    @property
    def arguments(self) -> tuple:
        return (*self.case.arguments[:2], self.top_k, None, self.case.labels)

    def with_(self, **changes) -> "SparseCase":
        return SparseCase(self.case.with_(**changes), self.top_k)

    def doubled(self) -> "SparseCase":
        return SparseCase(self.case.doubled(), self.top_k)

    def flat(self) -> tuple[Tensor, Tensor]:
        """ids and logprobs of the kept rows, (K, k)."""
        return tuple(one.reshape(-1, one.shape[-1])[self.kept] for one in (self.top_k.ids, self.top_k.logprobs))


def logits(case, who: str) -> Tensor:
    """Of all rows, (N, V) in the dtype of the case, V the vocabulary in use."""
    hidden, weight, bias = (getattr(case, f"{who}_{name}") for name in ("hidden", "weight", "bias"))
    size = case.vocab_size or case.student_weight.shape[0]
    return reference.logits(
        hidden.flatten(0, -2),
        weight[:size],
        None if bias is None else bias[:size],
        temperature=case.temperature,
        **getattr(case, f"{who}_options"),
    )


def sparse(case, k: int, *, ids: torch.dtype = torch.int64, logprobs: torch.dtype = torch.float32) -> SparseCase:
    """The k likeliest ids of the case's teacher, in an order that says nothing."""
    with torch.no_grad():
        likeliest = logits(case.doubled(), "teacher").log_softmax(1).topk(k, 1)
    order = torch.rand(likeliest.values.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    order = order.to(likeliest.values.device)
    shape = (*case.labels.shape, k)
    return SparseCase(
        case,
        TopK(
            likeliest.indices.gather(1, order).to(ids).view(shape),
            likeliest.values.gather(1, order).to(logprobs).view(shape),
            temperature=case.temperature,
        ),
    )


def oracle(case: SparseCase, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every statistic of the kept rows, (K,) float64 with a graph to the leaves, which come second, by name."""
    double = case.doubled()
    ids, logprobs = case.flat()
    found = reference.top_k_token_stats(
        logits(double, "student")[case.kept],
        ids.long(),
        logprobs,
        case.labels.flatten()[case.kept],
        beta=case.beta,
        alpha=case.alpha,
        interpolation=case.interpolation,
        **options,
    )
    return found, double.leaves


def weights_of(case, names=FIELDS, seed=5) -> dict[str, Tensor]:
    """A coefficient for each token and statistic, (N,)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(case.labels.numel(), generator=generator).to(case.labels.device) for name in names}


def expected_gradients(case: SparseCase, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of statistics over kept rows, and its gradients by name, in float64."""
    expected, leaves = oracle(case)
    loss = sum((weights[name][case.kept].double() * expected[name]).sum() for name in weights)
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
