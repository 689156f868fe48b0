"""`--delta` and `--alpha`: a model of the command line with a delta's logits added to its own."""

from minillm import UserError
from minillm.models.open import model_path
from minillm.reporting.console import Console
from minillm.teachers.open import with_delta
from minillm.teachers.pair import Models

ALPHA = 1.0  # where nothing is said, as the delta was trained


def add_delta(models: Models, delta: str | None, alpha: float | None, console: Console, *, dtype: str) -> Models:
    """The models with the delta that the options name, if they name one; of one with another tokenizer the console shows
    first how much of the vocabulary has a counterpart.

    Raises UserError for an alpha without a delta, and whatever opening raises.
    """
    if delta is None:
        if alpha is not None:
            raise UserError("--alpha has no effect without --delta, whose logits it multiplies")
        return models
    models = with_delta(models, model_path(delta), alpha=ALPHA if alpha is None else alpha, dtype=dtype)
    if models.delta.translation is not None:
        header = ("counterpart", "ids", "it is")
        console.table("Two tokenizers", header, models.delta.translation.map.rows())
    return models
