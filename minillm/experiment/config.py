"""The keys of an experiment's file. `base`, `shared` and `arms` are made of the keys of a run's configuration."""

from typing import Annotated, Any, Literal

from pydantic import Field

from minillm.config.keys import FolderPath, Seed, Strict

Relation = Literal["below", "above", "at_most", "at_least"]


class Claim(Strict):
    """One claim that the experiment tests: the `measure` of `arm` is below (above, ...) that of `than`.

    With a margin m and the other's value v: below v (1 - m), above v (1 + m), at most v (1 + m), at least v (1 - m).
    """

    says: str = Field(description="The claim in words, as the report has it")
    arm: str = Field(description="An arm, or teacher")
    measure: str = Field(description="One of `measures`")
    relation: Relation = Field(description="How the arm's value must lie to the other's")
    than: str = Field(description="Another arm, or teacher")
    margin: Annotated[float, Field(ge=0.0)] = Field(0.0, description="As a fraction of the other's value")


class ExperimentConfig(Strict):
    """The keys of one experiment."""

    extends: str | None = Field(
        None, description="Another experiment's file, beside this one, that this is merged over"
    )
    title: str = Field(description="The heading of its report")
    description: str = Field("", description="What is compared and how, and what was tried before; Markdown")
    output_dir: FolderPath = Field(description="Where every run and the report go; --output overrides it")
    seeds: list[Seed] = Field(min_length=1, description="Every arm is trained with each of them")
    base: dict[str, Any] = Field(description="The keys that all runs have, as in a run's configuration")
    shared: dict[str, dict[str, Any] | None] = Field(
        {},
        description="Stages trained once per seed, which arms take as stage:NAME: a model to start from, or data that a stage without steps has left",
    )
    arms: dict[str, dict[str, Any] | str | None] = Field(
        min_length=1,
        description="What is compared: the keys in which an arm's training differs from base, or a model that is "
        "measured as it is (a path, stage:NAME, or `student`: that of base before any training)",
    )
    evaluation: dict[str, Any] = Field(description="How every arm is measured in the end: the keys of `eval`")
    measures: list[str] = Field(min_length=1, description="The columns of the table, METRIC or METRIC@SET")
    claims: list[Claim] = []
