"""The keys of method cache; what it writes is said in minillm/methods/cache.py."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig
from minillm.config.needs import Needs

Texts = Literal["references", "answers", "corpus"]
Storage = Literal["bfloat16", "float16", "float32", "int8"]


class Cache(MethodConfig):
    """The rows of a teacher, written to disk once, so that later stages learn from it without its weights."""

    name: Literal["cache"]
    texts: list[Texts] = Field(
        ["references"],
        min_length=1,
        description="The texts that the teacher reads. references: the prompts with theirs; answers: the prompts with an "
        "answer that it writes itself, as rollout says; corpus: the blocks of data.corpus",
    )
    rows: Literal["hidden", "top_k"] = Field(
        "hidden",
        description="hidden: its last hidden states, from which every loss over the full vocabulary follows; top_k: its k "
        "likeliest ids, whose losses are over these and the rest",
    )
    dtype: Storage = Field(
        "bfloat16",
        description="Of what is stored; int8 has a scale for every row. The error of the rows written is in cache.json",
    )
    k: Annotated[int, Field(ge=1)] = Field(64, description="top_k: ids for every token")
    shard_mib: Annotated[int, Field(ge=1)] = Field(
        256, description="Size of a file of rows, MiB; a kill loses the file in hand at most"
    )
    summary: ClassVar[str] = "nothing: what the teacher says of the data was written to disk"

    def needs(self) -> Needs:
        answers, references = "answers" in self.texts, "references" in self.texts
        return Needs(
            (),
            prompts=answers or references,
            references=references,
            corpus="corpus" in self.texts,
            samples=("teacher",) if answers else (),
            written_once=answers,
            teacher=True,
            teacher_abilities=frozenset({"hidden", "sample"} if answers else {"hidden"}),
            trains=(),
            leaves="rows",
        )

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        if len(set(self.texts)) < len(self.texts):
            yield "texts", f"names a kind of text more than once: {', '.join(self.texts)}", ()
        if self.rows == "top_k" and self.dtype == "int8":
            yield "dtype", "int8 is for hidden states; log-probabilities need float16, bfloat16 or float32", ("rows",)

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if self.rows == "hidden":
            yield "k", "has no effect on rows hidden; it is for top_k", "rows"


KEYS = Cache
