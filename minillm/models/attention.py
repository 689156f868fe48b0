"""The attention kernel of a model: the one that was asked for, or eager where an architecture has no sdpa."""

from collections.abc import Callable

from transformers import PreTrainedModel

from minillm import UserError


def with_attention(make: Callable[[str], PreTrainedModel], asked: str) -> PreTrainedModel:
    """`make(asked)`. In the place of sdpa, which is the default, an architecture without it gets eager: the same numbers.

    Raises UserError for any other kernel that the architecture lacks, and whatever `make` does for another reason.
    """
    try:
        return make(asked)
    except UserError:
        raise
    except ValueError as refusal:
        if asked == "eager":
            raise
        try:
            model = make("eager")
        except ValueError:
            raise refusal from None  # it was not about attention
        if asked == "sdpa":
            return model
        raise UserError(
            f"attn_implementation: {asked}: {type(model).__name__} has no such attention; leave the key out, or write eager"
        ) from refusal
