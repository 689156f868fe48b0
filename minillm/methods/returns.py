"""Rewards to advantages, on the vectors of finished answers. Everything here is float64 and carries no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor


def discounted_returns(
    rewards: Tensor,  # (T,) nats
    *,
    gamma: float = 1.0,
    start: str = "next",
    length_norm: bool = True,
) -> Tensor:  # (T,)
    """R_t = sum over t' >= t + s of gamma^(t' - t - s) r_t', with s = 1 for start "next" and 0 for "current".

    `length_norm` divides by the number of rewards in the sum (MiniLLM, arXiv 2306.08543, section 2.2: R^Norm_{t+1} =
    1/(T-t-1) sum over t' > t). The last token's return from the next token on is 0. Discounting is relative to t and
    runs backwards, so that long answers neither overflow nor divide by a vanished gamma^t.
    """
    T, total, sums = len(rewards), 0.0, []
    for reward in reversed(rewards.tolist()):  # of floats: torch would have an operation for each token
        total = reward + gamma * total
        sums.append(total)
    current = torch.tensor(sums[::-1], dtype=torch.float64)
    counts = torch.arange(T, 0, -1, dtype=torch.float64)
    if start == "next":
        current = torch.cat([current[1:], current.new_zeros(min(T, 1))])
        counts = (counts - 1).clamp(min=1)
    return current / counts if length_norm else current


def shape_rewards(rewards: Tensor, *, scaling: float | None, cliprange: float | None) -> Tensor:  # (T,) -> (T,)
    """Rewards divided by `scaling`, then clipped to +-`cliprange`, as the released MiniLLM code does."""
    if scaling is not None:
        rewards = rewards / scaling
    if cliprange is not None:
        rewards = rewards.clamp(-cliprange, cliprange)
    return rewards


def whiten(advantages: Sequence[Tensor], *, over: str) -> list[Tensor]:  # one (T,) an answer
    """(A - mean) / sqrt(var + 1e-8) with the unbiased variance over the whole buffer.

    over "valid" counts response tokens. "all" also counts the padding up to the longest answer as zeros, as the released
    code does (there over each micro-batch); it pulls the mean towards zero and shrinks the variance.
    """
    if over == "none" or not advantages:
        return list(advantages)
    values = torch.cat(list(advantages))
    if over == "all":
        width = max(len(vector) for vector in advantages)
        values = torch.cat([values, values.new_zeros(width * len(advantages) - len(values))])
    if len(values) < 2:
        return list(advantages)
    mean, scale = values.mean(), (values.var() + 1e-8).rsqrt()
    return [(vector - mean) * scale for vector in advantages]


def importance_weights(
    student_logprob: Tensor,  # (T,) log q_old(y_t)
    mixture_logprob: Tensor,  # (T,) log p~(y_t)
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # three times (T,)
    """Weights of the rewards, of the policy gradient and of the single-step term, for answers sampled from p~.

    With w_t = q_old(y_t) / p~(y_t):
    - "token" (MiniLLM's approximation, section 2.2): 1, w_t and w_t;
    - "per_decision" (exact): the reward r_t' takes the product over s <= t', the single-step term at t the product
      over s < t, and the policy gradient none of its own;
    - "sequence" (exact, larger variance): the product over the whole answer on both terms.
    """
    log_w = student_logprob.double() - mixture_logprob.double()
    ones = torch.ones_like(log_w)
    if kind == "token":
        return ones, log_w.exp(), log_w.exp()
    if kind == "per_decision":
        through = log_w.cumsum(0)
        return through.exp(), ones, (through - log_w).exp()
    whole = log_w.sum().exp() * ones
    return ones, whole, whole
