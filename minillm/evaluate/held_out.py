"""Conditions on held-out data, before a student is measured on it beside its teacher."""

from collections.abc import Iterable, Mapping

from transformers import PreTrainedTokenizerBase

from minillm.data.instructions import PromptSet, require_shared_pictures
from minillm.data.labels import LabelSet
from minillm.data.pairs import PairSet
from minillm.teachers.pair import Models


def require_shared_data(
    key: str,
    sets: Mapping[str, PromptSet],
    labels: Mapping[str, LabelSet],
    pairs: Mapping[str, PairSet],
    models: Models,
    teachers: Iterable[PreTrainedTokenizerBase],
) -> None:
    """Raises DataError for pictures that student and teacher would not be shown alike, UserError for ids that they do not share.

    Args:
        key: of the evaluation, for errors.
        teachers: the tokenizers of all teachers.
    """
    named = {"sets": sets, "calibration": labels, "preference.pairs": pairs}
    held_out = {f"{key}.{group}.{name}": one for group, read in named.items() for name, one in read.items()}
    # questions of a classification show none
    pictured = {name: one for name, one in held_out.items() if not isinstance(one, LabelSet)}
    require_shared_pictures(pictured, models.tokenizer, teachers)
    for name, one in held_out.items():
        models.require_shared(name, one.ids())
