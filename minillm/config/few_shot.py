"""The keys of a few-shot prompt, by which a teacher is asked to reason before it answers."""

from typing import Annotated, Literal

from pydantic import Field

from minillm.config.data import FieldText, Parser, Template, TemplateKeys

Part = Literal["rationale", "label"]  # of an answer that reasons


class FewShot(TemplateKeys):
    """The prompt that a teacher answers for every record, and the way in which its answers are read."""

    prompt: FieldText = Field(
        description="Solved examples and then the question, with {FIELD} for fields of the record, and {{ for a brace"
    )
    parser: Parser = Field(description="Takes an answer apart into a rationale and a label")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Texts before the first of which an answer ends, such as those that the next question would begin with",
    )
    template: Template = Field("none", description="As for data.prompts; none: the prompt as it is")
    temperature: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Of the answers; 0 is greedy")
    max_prompt_length: Annotated[int, Field(ge=1)] = Field(
        1024, description="In tokens, solved examples included; records with longer prompts are dropped, and counted"
    )
