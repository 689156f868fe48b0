"""What a method needs, declared by its configuration class as a function of its keys.

Checks, planning, stage building, evaluation, report and card read these declarations; none of them knows a method by
its name.
"""

from dataclasses import dataclass, field
from typing import Literal

Sampler = Literal["student", "teacher", "mixture"]
Rows = Literal["answers", "references", "pairs", "corpus"]


@dataclass(frozen=True)
class TermNeeds:
    """One term of a method's loss: which texts its rows stand in, and whether it reads the teacher there."""

    name: str
    rows: tuple[Rows, ...]  # several where steps differ; the longest counts
    teacher: bool = False


@dataclass(frozen=True)
class Needs:
    """Everything that a stage must know of its method before the method exists.

    `because` names the key of `method` that a need comes from, by the need's field: changing it does away with the need.
    """

    terms: tuple[TermNeeds, ...]  # empty where the stage takes no step
    # data
    prompts: bool = True
    references: bool = False  # prompts come with an answer to imitate
    pairs: bool = False  # prompts come with a chosen and a rejected answer
    corpus: bool = False  # plain text in blocks
    images: bool = False  # prompts show pictures
    # sampling
    samples: tuple[Sampler, ...] = ()  # who answers prompts while the stage runs, one after the other
    written_once: bool = False  # every prompt is answered before the first step, and the answers are kept on disk
    buffered: bool = False  # answers are scored once by both models and used for `inner_epochs`
    inner_epochs: int = 1
    neutral_sampling: bool = False  # answers must come from the models' own distributions
    temperature_key: str = "rollout.temperature"  # the key that sets the temperature of the answers
    # models
    teacher: bool = False
    teacher_abilities: frozenset[str] = frozenset()  # beyond rows for a loss: minillm.teachers.teacher.Ability
    trains: tuple[str, ...] = ("student",)  # models, and modules that the method makes
    because: dict[str, str] = field(default_factory=dict)

    @property
    def takes_steps(self) -> bool:
        """Whether the stage trains anything: one without terms leaves a result of another kind."""
        return bool(self.terms)

    @property
    def teacher_reads(self) -> bool:
        """Whether the teacher runs over texts of the stage, its own answers included."""
        return any(term.teacher for term in self.terms) or {"teacher", "mixture"} & set(self.samples) != set()


class UndeclaredNeeds(TypeError):
    """A method's configuration class that does not say what it needs."""
