"""`data`: prompts to answer and plain text for the pre-training loss."""

from typing import Annotated, Literal

from pydantic import Field

from minillm.config.keys import DatasetPath, FilesPath, Strict, default_type

Template = Literal["alpaca", "chat", "none"]


class InstructionKeys(Strict):
    """How a record becomes a prompt and its references, whatever file it comes from.

    A record is instruction/input/output, instruction/context/response, prompt/completion, question/answer or messages:
    recognised by its keys. Pictures are its `image` or `images`, or image parts of its messages: paths beside its file,
    data: URIs, or columns of Parquet files and datasets.
    """

    template: Template = Field(
        "alpaca",
        description="alpaca: the paper's preamble; chat: the tokenizer's chat template; none: the prompt as it is",
    )
    system: str | None = Field(None, description="chat: the system message; default: what the template itself adds")
    max_prompt_length: Annotated[int, Field(ge=1)] = Field(
        256, description="Tokens; longer prompts are dropped and counted, never cut"
    )
    max_response_length: Annotated[int, Field(ge=1)] = Field(
        256, description="Tokens; reference answers are cut here for supervised training"
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Take the first so many usable records")
    max_image_pixels: Annotated[int, Field(ge=1)] = Field(
        50_000_000, description="Of a picture as it is stored; a larger one is an error"
    )


class JsonlPrompts(InstructionKeys):
    """JSON objects, a line each; .gz is read as it is."""

    type: Literal["jsonl"] = "jsonl"
    path: FilesPath = Field(description="A file or a glob")


class ParquetPrompts(InstructionKeys):
    """Parquet files."""

    type: Literal["parquet"]
    path: FilesPath = Field(description="A file or a glob")


class HfPrompts(InstructionKeys):
    """A dataset of the `datasets` library: a hub name or a folder written by save_to_disk."""

    type: Literal["hf"]
    path: DatasetPath = Field(description="A hub name, or a folder that save_to_disk wrote")
    name: str | None = Field(None, description="The configuration of a hub dataset")
    split: str = Field("train", description="Which part of the dataset")


class PydocPrompts(InstructionKeys):
    """Questions about Python's own library, answered by the docstrings of the running interpreter."""

    type: Literal["pydoc"]
    template: Template = Field("chat", description="As for the others")
    split: Literal["train", "test"] = Field("train", description="A fixed tenth of all names, by hash, is the test")


class PlainPrompts(InstructionKeys):
    """Beginnings of plain texts, to be continued; what follows each beginning is its reference."""

    type: Literal["text"]
    path: FilesPath = Field(description="A .txt, .txt.gz or .jsonl (field `text`) file or a glob")
    template: Literal["none"] = "none"
    prompt_length: Annotated[int, Field(ge=1)] = Field(32, description="Tokens of each text that become the prompt")
    skip: Annotated[int, Field(ge=0)] = Field(0, description="Leave out the first so many texts (held-out splits)")


Prompts = Annotated[
    JsonlPrompts | ParquetPrompts | HfPrompts | PydocPrompts | PlainPrompts,
    Field(discriminator="type"),
    default_type("jsonl"),
]


class CorpusKeys(Strict):
    """Documents are joined by EOS and cut into blocks."""

    block_size: Annotated[int, Field(ge=2)] = Field(512, description="Tokens of a block")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Take the first so many documents")


class TextCorpus(CorpusKeys):
    """Plain text."""

    type: Literal["text"] = "text"
    path: FilesPath = Field(description="A .txt, .txt.gz or .jsonl (field `text`) file or a glob")
    skip: Annotated[int, Field(ge=0)] = Field(0, description="Leave out the first so many documents")


class HfCorpus(CorpusKeys):
    """A dataset of the `datasets` library whose records have a field `text`; a hub dataset is read as far as needed."""

    type: Literal["hf"]
    path: DatasetPath = Field(description="A hub name, or a folder that save_to_disk wrote")
    name: str | None = Field(None, description="The configuration of a hub dataset")
    split: str = Field("train", description="Which part of the dataset")
    skip: Annotated[int, Field(ge=0)] = Field(0, description="Leave out the first so many documents")


class PydocCorpus(CorpusKeys):
    """The docstrings of Python's own library."""

    type: Literal["pydoc"]


Corpus = Annotated[TextCorpus | HfCorpus | PydocCorpus, Field(discriminator="type"), default_type("text")]


class DataConfig(Strict):
    """What is trained on."""

    prompts: Prompts | None = Field(None, description="Instructions or beginnings; every method trains on these")
    corpus: Corpus | None = Field(None, description="Plain text for the pre-training loss (minillm's lm_coef)")
