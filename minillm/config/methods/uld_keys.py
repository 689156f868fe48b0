"""The keys of method uld; the formulas are in minillm/methods/uld.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds


class ULD(MethodConfig):
    """Universal logit distillation (arXiv 2402.12030): sorted probabilities, from a teacher with any tokenizer."""

    name: Literal["uld"]
    distance_coef: Annotated[float, Field(gt=0.0)] = Field(
        1.5, description="lambda: the weight of the distance of the sorted probabilities beside the cross-entropy"
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Compare the k largest probabilities one by one and the rest of each as one; the record has the most that "
        "this leaves out of the distance. null: all of them",
    )
    summary: ClassVar[str] = "reference answers and a teacher's sorted probabilities (ULD)"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "sorted_distance": ("Distance of the sorted probabilities", "0 to 2")
    }

    def needs(self) -> Needs:
        term = TermNeeds("distillation", ("references",), teacher=True, sorts=True)
        return Needs(
            (term,),
            references=True,
            teacher=True,
            teacher_abilities=frozenset({"read", "logprobs"}),
            other_tokenizer=True,
        )


KEYS = ULD
