"""`data`: prompts to answer, pairs of answers, and plain text for the pre-training loss."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from minillm.config.keys import DatasetPath, FilesPath, Strict, default_type

Template = Literal["alpaca", "chat", "none"]
Parser = Literal["gsm8k", "cqa", "svamp", "esnli", "anli"]  # minillm/data/answer_parsers.py


# Four million characters are about a million tokens.
MaxCharacters = Annotated[
    int,
    Field(
        ge=1,
        description="Of a rendered prompt, and of an answer, before any is tokenised: a longer prompt is dropped, and counted, "
        "and a longer answer is cut",
    ),
]
MAX_CHARACTERS = 4_000_000


class TemplateKeys(Strict):
    """The way in which a prompt is put to a model."""

    template: Template = Field(
        "alpaca",
        description="alpaca: the paper's preamble; chat: the tokenizer's chat template; none: the prompt as it is",
    )
    system: str | None = Field(
        None,
        description="chat: the system message of records that have none of their own; default: the one that the template adds",
    )
    template_kwargs: dict[str, Any] = Field(
        {}, description="chat: variables of the template, such as enable_thinking: false"
    )
    special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="Special tokens that a record spells, such as <|im_end|>. text: they are text like any other; tokens: they "
        "are the tokens, for prompts that were rendered already",
    )


class InstructionKeys(TemplateKeys):
    """The way from a record to a prompt and its references, whatever file it comes from.

    A record is recognised by its keys: a question (instruction, prompt, question) with an answer (output, response,
    completion, answer), or messages. Beside a question stand input or context, system or system_prompt, and history
    ([question, answer] pairs); tools, tool calls and reasoning_content need template: chat. Its pictures are its `image`
    or `images`, or image parts of its messages: paths beside its file, data: URIs, or columns of Parquet files and
    datasets.
    """

    max_prompt_length: Annotated[int, Field(ge=1)] = Field(
        256, description="In tokens; longer prompts are dropped, and counted, but never cut"
    )
    max_response_length: Annotated[int, Field(ge=1)] = Field(
        256, description="In tokens; for supervised training, reference answers are cut here"
    )
    max_characters: MaxCharacters = MAX_CHARACTERS
    limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The number of usable records that are taken, from the first on"
    )
    max_image_pixels: Annotated[int, Field(ge=1)] = Field(
        50_000_000, description="Of a picture as it is stored; a larger one is an error"
    )


FIELD_PART = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
FieldText = Annotated[str, Field(pattern=r"^([^{}]|\{\{|\}\}|\{[^{}]+\})*$")]  # with {FIELD}, and {{ for a brace


def field_names(text: str) -> list[str]:
    """The fields that a text names, in order."""
    return [found[1] for found in FIELD_PART.finditer(text) if found[1]]


class QuestionKeys(InstructionKeys):
    """The way from a record with fields to a question."""

    question: FieldText | None = Field(
        None, description="A text with {FIELD} for fields of the record; null: a record of one of the known forms"
    )
    prefix: str = Field("", description="Put before the question, such as `predict: ` for a student of several tasks")


class RecordKeys(QuestionKeys):
    """The way from a record with fields to a question and an answer that are made of them."""

    answer: FieldText | None = Field(
        None, description="The reference, likewise; null: that of the known form, and none to a question of your own"
    )
    parser: Parser | None = Field(
        None,
        description="Takes the reference apart into a rationale and a label, which are {rationale} and {label} of "
        "tasks, and what eval.label_accuracy compares with; null: it is not taken apart",
    )

    teacher_context: FieldText | None = Field(
        None,
        description="What the teacher alone reads beside the prompt: the name of a field of the record, or a text with {FIELD} "
        "for its fields, of which {reference} is the record's first answer; where it is empty the teacher reads the student's "
        "prompt",
    )
    teacher_prompt: FieldText = Field(
        "{prompt}\n\n{context}",
        description="The last message of the user as the teacher reads it: {prompt} is what the student reads there, {context} "
        "is teacher_context",
    )
    max_teacher_prompt_length: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="In tokens, of the prompt that the teacher reads; a record with a longer one is dropped, and counted; null: "
        "max_prompt_length",
    )

    @property
    def longest_for_teacher(self) -> int:
        """Tokens of the longest prompt that the teacher reads."""
        if self.teacher_context is None or self.max_teacher_prompt_length is None:
            return self.max_prompt_length
        return self.max_teacher_prompt_length


class TaskKeys(Strict):
    """One of several tasks that are made of every record: a prefix to its question, and an answer of its own."""

    prefix: str = Field("", description="Put before the question, so that the model knows which task is meant")
    answer: FieldText = Field(
        description="A text with {FIELD} for fields of the record, and {rationale} and {label} where data.prompts.parser finds them"
    )


class JsonlSource(Strict):
    """JSON objects, one per line; .gz files are read as they are."""

    type: Literal["jsonl"] = "jsonl"
    path: FilesPath = Field(description="A file or a glob")


class ParquetSource(Strict):
    """Parquet files."""

    type: Literal["parquet"]
    path: FilesPath = Field(description="A file or a glob")


class HfSource(Strict):
    """A dataset of the `datasets` library, by its hub name or in a folder."""

    type: Literal["hf"]
    path: DatasetPath = Field(
        description="A hub name, a folder that save_to_disk wrote, or one with files that `datasets` knows"
    )
    name: str | None = Field(None, description="The configuration of a hub dataset")
    split: str = Field("train", description="The part of the dataset")


class JsonlPrompts(JsonlSource, RecordKeys):
    """JSON objects, one per line; .gz files are read as they are."""


class ParquetPrompts(ParquetSource, RecordKeys):
    """Parquet files."""


class HfPrompts(HfSource, RecordKeys):
    """A dataset of the `datasets` library, by its hub name or in a folder."""


class PydocPrompts(RecordKeys):
    """Questions about Python's own library, answered by the docstrings of the running interpreter."""

    type: Literal["pydoc"]
    template: Template = Field("chat", description="As for the other types")
    split: Literal["train", "test"] = Field(
        "train", description="test is a fixed tenth of all names, chosen by hash; train is the rest"
    )


class ArithmeticPrompts(RecordKeys):
    """Sums of several steps, made on the spot: question, answer (as GSM8K has it), and its parts rationale and label."""

    type: Literal["arithmetic"]
    template: Template = Field("none", description="As for the other types")
    steps: Annotated[int, Field(ge=1)] = Field(3, description="Additions and subtractions in a question")
    largest: Annotated[int, Field(ge=1)] = Field(9, description="The largest number in a question")
    split: Literal["train", "test"] = Field(
        "train", description="test is a fixed tenth of all questions, chosen by hash; train is the rest"
    )
    limit: Annotated[int, Field(ge=1)] = Field(1000, description="The number of questions; they may repeat")


class EasyVqaSource(Strict):
    """Questions about pictures of coloured shapes, with one word for an answer: the data of the package easy-vqa."""

    type: Literal["easy_vqa"]
    template: Template = Field("chat", description="As for the other types")
    split: Literal["train", "test"] = Field(
        "train", description="train: 38,575 questions; test: 9,673, of other pictures"
    )
    answers: Annotated[list[Literal["yes_no", "color", "shape"]], Field(min_length=1)] = Field(
        ["yes_no", "color", "shape"], description="The kinds of answers that are wanted"
    )
    balanced: bool = Field(
        False,
        description="Equally many questions of each of these kinds; else three of four are answered by yes or no",
    )


class EasyVqaPrompts(EasyVqaSource, RecordKeys):
    """Questions about pictures of coloured shapes, with one word for an answer: the data of the package easy-vqa."""


class PlainPrompts(InstructionKeys):
    """Beginnings of plain texts, to be continued; the rest of each text is its reference."""

    type: Literal["text"]
    path: FilesPath = Field(description="A .txt, .txt.gz or .jsonl (field `text`) file or a glob")
    template: Literal["none"] = "none"
    prompt_length: Annotated[int, Field(ge=1)] = Field(
        32, description="Number of tokens of each text that become the prompt"
    )
    skip: Annotated[int, Field(ge=0)] = Field(
        0, description="The number of texts that are left out at the beginning, for held-out splits"
    )


Prompts = Annotated[
    JsonlPrompts | ParquetPrompts | HfPrompts | PydocPrompts | ArithmeticPrompts | EasyVqaPrompts | PlainPrompts,
    Field(discriminator="type"),
    default_type("jsonl"),
]


class PairKeys(QuestionKeys):
    """The way from a record to a prompt with two answers, of which the first is preferred.

    The answers are texts, or lists of messages: the answer alone, or the whole conversation with it as the last message,
    which gives the prompt where the record has no question.
    """

    chosen: str = Field("chosen", description="The field with the preferred answer")
    rejected: str = Field("rejected", description="The field with the other answer")


class JsonlPairs(JsonlSource, PairKeys):
    """JSON objects, one per line; .gz files are read as they are."""


class ParquetPairs(ParquetSource, PairKeys):
    """Parquet files."""


class HfPairs(HfSource, PairKeys):
    """A dataset of the `datasets` library, by its hub name or in a folder."""


class EasyVqaPairs(EasyVqaSource, PairKeys):
    """The answers of easy-vqa's questions, preferred to another word of their kind."""


Pairs = Annotated[
    JsonlPairs | ParquetPairs | HfPairs | EasyVqaPairs, Field(discriminator="type"), default_type("jsonl")
]


class CorpusKeys(Strict):
    """The way from documents to blocks: they are joined by EOS and cut.

    Special tokens that a document spells, such as <|endoftext|>, are the tokens, so that it may have separators of its own.
    """

    block_size: Annotated[int, Field(ge=2)] = Field(512, description="Number of tokens in a block")
    limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The number of documents that are taken, from the first on"
    )


class TextCorpus(CorpusKeys):
    """Plain text."""

    type: Literal["text"] = "text"
    path: FilesPath = Field(description="A .txt, .txt.gz or .jsonl (field `text`) file or a glob")
    skip: Annotated[int, Field(ge=0)] = Field(
        0, description="The number of documents that are left out at the beginning"
    )


class HfCorpus(CorpusKeys):
    """A dataset of the `datasets` library whose records have a field `text`. A hub dataset is fetched as far as it is needed."""

    type: Literal["hf"]
    path: DatasetPath = Field(
        description="A hub name, a folder that save_to_disk wrote, or one with files that `datasets` knows"
    )
    name: str | None = Field(None, description="The configuration of a hub dataset")
    split: str = Field("train", description="The part of the dataset")
    skip: Annotated[int, Field(ge=0)] = Field(
        0, description="The number of documents that are left out at the beginning"
    )


class PydocCorpus(CorpusKeys):
    """The docstrings of Python's own library."""

    type: Literal["pydoc"]


Corpus = Annotated[TextCorpus | HfCorpus | PydocCorpus, Field(discriminator="type"), default_type("text")]


class DataConfig(Strict):
    """The data that a stage trains on."""

    prompts: Prompts | None = Field(
        None, description="Instructions, or beginnings of texts; most methods train on these"
    )
    pairs: Pairs | None = Field(
        None,
        description="Prompts with a chosen and a rejected answer each, for a preference (method dpkd, pairs: data)",
    )
    forget: Prompts | None = Field(
        None,
        description="Prompts with answers that the model shall no longer give, for methods that unlearn; as data.prompts",
    )
    corpus: Corpus | None = Field(
        None,
        description="Plain text, for a pre-training loss (method.lm_coef) and for methods that choose from it; special tokens "
        "that it spells, such as <|endoftext|>, are the tokens (those of prompts are text, by prompts.special_tokens)",
    )
