"""What an evaluation measures beyond the scores of its answers: exposure bias, calibration on label words."""

from typing import Annotated, Literal

from pydantic import Field

from minillm.config.data import Template
from minillm.config.keys import DatasetPath, FilesPath, Strict, default_type

Positive = Annotated[int, Field(ge=1)]


class ExposureBias(Strict):
    """The excess accumulated error of the student's own prefixes over the teacher's (minillm eval and experiment)."""

    lengths: list[Positive] = Field([16, 32, 64, 128], min_length=1, description="Tokens at which it is reported")
    samples: Positive = Field(1, description="Answers of each model to each prompt (the paper: 10)")


class LabelKeys(Strict):
    """How a record becomes a question and one of several label words."""

    question: str = Field(description="The instruction, with {FIELD} for fields of the record")
    label: str = Field(description="The field with the label: one of the words, its place among them, or true or false")
    words: list[str] = Field(
        min_length=2, description="The answers compared; for labels that are places or false and true, in that order"
    )
    template: Template = Field("alpaca", description="As for prompts")
    system: str | None = Field(None, description="chat: the system message; default: what the template itself adds")
    max_prompt_length: Positive = Field(256, description="Tokens; longer questions are dropped and counted")
    limit: Positive | None = Field(None, description="Take the first so many usable records")


class JsonlLabels(LabelKeys):
    """JSON objects, a line each; .gz is read as it is."""

    type: Literal["jsonl"] = "jsonl"
    path: FilesPath = Field(description="A file or a glob")


class ParquetLabels(LabelKeys):
    """Parquet files."""

    type: Literal["parquet"]
    path: FilesPath = Field(description="A file or a glob")


class HfLabels(LabelKeys):
    """A dataset of the `datasets` library: a hub name or a folder written by save_to_disk."""

    type: Literal["hf"]
    path: DatasetPath = Field(description="A hub name, or a folder that save_to_disk wrote")
    name: str | None = Field(None, description="The configuration of a hub dataset")
    split: str = Field("validation", description="Which part of the dataset")


Labels = Annotated[JsonlLabels | ParquetLabels | HfLabels, Field(discriminator="type"), default_type("jsonl")]
