"""The keys of method miniplm; the formulas are in minillm/methods/miniplm.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.keys import ModelPath
from minillm.config.method import MethodConfig
from minillm.config.needs import Needs


class MiniPLM(MethodConfig):
    """A corpus chosen by a teacher and a weaker reference model (MiniPLM, arXiv 2410.17215); the student is not touched."""

    name: Literal["miniplm"]
    reference: ModelPath = Field(
        description="The weaker model that the teacher is compared to, with the teacher's tokenizer: as teacher.path, mostly "
        "the stage:NAME of an lm. It is read in teacher.dtype"
    )
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5,
        description="The part of all documents that is kept: floor(ratio * documents), counted as the number is written",
    )
    summary: ClassVar[str] = "nothing: documents were chosen by how much likelier the teacher finds them (MiniPLM)"

    def needs(self) -> Needs:
        return Needs(
            (),
            prompts=False,
            corpus=True,
            whole_documents=True,
            teacher=True,
            reference=self.reference,
            trains=(),
        )


KEYS = MiniPLM
