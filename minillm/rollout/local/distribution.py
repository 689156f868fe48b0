"""The way from logits to a sampled token: one model's distribution, or the mixture of two, by the inverse of its CDF.

p~ = alpha p + (1 - alpha) q mixes probabilities, each model's after its own temperature, top-k and top-p (MiniLLM,
arXiv 2306.08543, section 2.2). One uniform decides a token: the first one whose cumulative probability exceeds it. The
sum runs over blocks of ids first, in float64, and then inside the block that was hit, so that the mixture is formed
for that block alone and no float64 tensor of the vocabulary's size exists.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

BLOCK = 128
BELOW_ONE = 1.0 - 2.0**-53


def padded_size(vocab_size: int) -> int:
    """Columns of a logits tensor whose blocks are whole; those beyond the vocabulary hold -inf."""
    return -(-vocab_size // BLOCK) * BLOCK


def process(
    logits: Tensor,  # (B, V padded) fp32
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:  # (B, V padded), perhaps the same memory
    """Temperature, then top-k, then top-p, each as in transformers; a token that is cut gets -inf."""
    if temperature != 1.0:
        logits = logits.div_(temperature)
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1.0:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits


class Component:
    """One model's part of the distribution: exp(logits - max), never normalised over the whole vocabulary."""

    def __init__(self, logits: Tensor, weight: float):  # (B, V padded) fp32, overwritten
        self.weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        self.blocks = self.weights.unflatten(-1, (-1, BLOCK))  # (B, blocks, BLOCK), a view
        sums = self.blocks.sum(-1).double()
        self.scale = weight / sums.sum(-1, keepdim=True)  # (B, 1)
        self.block_probabilities = sums.mul_(self.scale)  # (B, blocks)

    def block(self, rows: Tensor, chosen: Tensor) -> Tensor:  # (B,), (B,) -> (B, BLOCK)
        """Probabilities of one block a row, float64."""
        return self.blocks[rows, chosen].double().mul_(self.scale)


def draw_tokens(
    components: Sequence[Component],
    uniform: Tensor,  # (B,) float64 in (0, 1)
) -> tuple[Tensor, Tensor]:  # (B,) int64, (B,) float64
    """A token a row and its log-probability. A token of probability 0 is never drawn.

    The weights of the components add up to 1. NaN logits give a NaN log-probability.
    """
    rows = torch.arange(len(uniform), device=uniform.device)
    by_block = sum(component.block_probabilities for component in components)
    chosen, _, rest = _invert(by_block, uniform)
    inside = sum(component.block(rows, chosen) for component in components)  # (B, BLOCK)
    position, probability, _ = _invert(inside, rest, absolute=True)
    return chosen * BLOCK + position, probability.log()


def likeliest_tokens(
    logits: Sequence[Tensor],  # (B, V padded) fp32 a model, overwritten
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:  # (B,) int64, (B,) float64
    """The likeliest token a row and its log-probability; the lowest id where several are."""
    if len(logits) == 1:
        tokens = logits[0].argmax(-1)  # of the logits: exp can round two of them to one weight
    components = [Component(one, weight) for one, weight in zip(logits, weights, strict=True)]
    if len(logits) > 1:
        tokens = sum(component.weights * component.scale for component in components).argmax(-1)
    chosen = tokens[:, None]
    probability = sum(component.weights.gather(-1, chosen).double() * component.scale for component in components)
    return tokens, probability[:, 0].log()


def _invert(
    probabilities: Tensor,  # (B, K) float64
    target: Tensor,  # (B,) float64: a fraction of the sum, or where `absolute` a part of it
    *,
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # (B,) int64, (B,) float64, (B,) float64
    """The first index whose cumulative sum exceeds the target, its probability, and what the target exceeds the sum
    before it by."""
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    # strictly below the total, and never negative: what is rounded here never reaches a token of probability 0
    target = torch.minimum(target.clamp_min(0.0), total * BELOW_ONE) if absolute else target * total
    index = torch.searchsorted(cumulative, target[:, None], right=True).clamp_(max=cumulative.shape[-1] - 1)
    probability = probabilities.gather(-1, index)[:, 0]
    rest = target - (cumulative.gather(-1, index)[:, 0] - probability)
    return index[:, 0], probability, rest
