"""Keys of the analyses that an evaluation may make beside its scores: exposure bias, calibration on label words, preference."""

from typing import Annotated

from pydantic import Field

from minillm.config.data import FieldText, HfSource, JsonlSource, Pairs, ParquetSource, TemplateKeys
from minillm.config.keys import Strict, default_type

Positive = Annotated[int, Field(ge=1)]


class ExposureBias(Strict):
    """The excess accumulated error of the student's own prefixes over the teacher's (minillm eval and experiment)."""

    lengths: list[Positive] = Field(
        [16, 32, 64, 128], min_length=1, description="Numbers of tokens at which it is reported"
    )
    samples: Positive = Field(1, description="Answers that each model gives to each prompt (the paper: 10)")


class Preference(Strict):
    """Held-out pairs of answers: how far the student prefers the first, with the teacher as the reference (minillm eval and
    experiment). The score of an answer is its log q / p, over its tokens."""

    pairs: dict[str, Pairs] = Field({}, description="Named pairs of a chosen and a rejected answer, as data.pairs")
    sampled: bool = Field(
        False,
        description="Also, on the prompts of eval.sets, an answer of the teacher before one of the student, both sampled",
    )
    length_norm: bool = Field(True, description="Divide the score of an answer by its number of tokens")
    reference_free: bool = Field(False, description="Compare the student's log q, without the teacher's log p")


class LabelKeys(TemplateKeys):
    """The way from a record to a question and one of several label words, whatever file it comes from."""

    question: FieldText = Field(description="The instruction, with {FIELD} for fields of the record")
    label: str = Field(
        description="The field that holds the label: one of the words, its position among them, or true or false"
    )
    words: list[str] = Field(
        min_length=2,
        description="The answers that are compared; where labels are positions, or false and true, in that order",
    )
    max_prompt_length: Positive = Field(256, description="In tokens; longer questions are dropped, and counted")
    limit: Positive | None = Field(None, description="The number of usable records that are taken, from the first on")


class JsonlLabels(JsonlSource, LabelKeys):
    """JSON objects, one per line; .gz files are read as they are."""


class ParquetLabels(ParquetSource, LabelKeys):
    """Parquet files."""


class HfLabels(HfSource, LabelKeys):
    """A dataset of the `datasets` library, by its hub name or in a folder."""

    split: str = Field("validation", description="The part of the dataset")


Labels = Annotated[JsonlLabels | ParquetLabels | HfLabels, Field(discriminator="type"), default_type("jsonl")]
