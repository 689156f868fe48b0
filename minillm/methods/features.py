"""Losses over hidden states, of LLAVADI (arXiv 2407.19409): projected features, and affinities of pictures and answers.

Every sequence counts alike: a distance is the mean over its own places first. Affinities are pooled over all pairs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.models.batch import TokenBatch

Distance = Callable[[Tensor, Tensor], Tensor]  # (P, H), (P, H) -> (P,)


def mean_squared_error(projected: Tensor, target: Tensor) -> Tensor:  # (P, H) each
    """The mean over the width, for each place (P,)."""
    return (projected.float() - target.float()).square().mean(-1)


def cosine_distance(projected: Tensor, target: Tensor) -> Tensor:  # (P, H) each
    """1 less the cosine of the two vectors of each place (P,)."""
    return 1 - F.cosine_similarity(projected.float(), target.float(), dim=-1)


DISTANCES: dict[str, Distance] = {"mse": mean_squared_error, "cosine": cosine_distance}


def places_of(batch: TokenBatch, tokens: str, pictures: Tensor) -> Tensor:  # pictures: (B, L) bool -> (P,) int64
    """The flattened (B * L) positions of `tokens`, in order.

    answers: where a token of an answer is predicted; text: those, and every other position of the prompt that does not
    stand for a picture; all: those as well.
    """
    if tokens == "answers":
        return batch.rows
    chosen = batch.attention_mask.bool().flatten()
    if tokens == "text":
        chosen &= ~pictures.flatten()
        chosen[batch.rows] = True  # a prompt may end in a picture
    return chosen.nonzero().flatten()


def mean_in_sequences(places: Tensor, width: int) -> Tensor:  # (P,) of B sequences of `width` positions -> (P,) fp32
    """The weight of each place with which a sum over places is the sum over sequences of their means."""
    sequence = places // width
    return 1.0 / sequence.bincount()[sequence]


def affinities(
    hidden: Tensor,  # (P, H), at `places`
    places: Tensor,  # (P,) int64, flattened positions in order
    answers: Sequence[Tensor],  # of each of B sequences the positions that predict its answer, which are among `places`
    pictures: Tensor,  # (B, L) bool, positions that are among `places` too
) -> Tensor:
    """The cosines of all pairs of a picture's place and one of the same sequence's answer, sequence by sequence (pairs,)."""
    unit = F.normalize(hidden.float(), dim=-1)
    found = []
    for number, rows in enumerate(answers):
        shown = pictures[number].nonzero().flatten() + number * pictures.shape[1]
        one, other = (unit[torch.searchsorted(places, chosen)] for chosen in (shown, rows))
        found.append((one @ other.T).flatten())
    return torch.cat(found)
