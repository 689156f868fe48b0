"""Methods that this project does not have, registered as a package of someone else's would."""

from typing import ClassVar, Literal

from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, Rows, Sampler, TermNeeds


class Elsewhere(MethodConfig):
    """A method whose keys are what it declares."""

    name: Literal["elsewhere"]
    summary: ClassVar[str] = "a method of elsewhere"
    rows: list[Rows] = ["answers"]
    judged: bool = False  # its term reads the teacher
    samplers: list[Sampler] = []
    buffered: bool = False
    trains: list[str] = ["student"]

    def needs(self) -> Needs:
        term = TermNeeds("imitation", tuple(self.rows), teacher=self.judged)
        return Needs(
            (term,),
            prompts=set(self.rows) != {"corpus"},
            corpus="corpus" in self.rows,
            samples=tuple(self.samplers),
            buffered=self.buffered,
            inner_epochs=2 if self.buffered else 1,
            teacher=self.judged or bool({"teacher", "mixture"} & set(self.samplers)),
            trains=tuple(self.trains),
        )


class Sieve(MethodConfig):
    """A stage that takes no step: both models read what is there."""

    name: Literal["sieve"]
    summary: ClassVar[str] = "a choice of texts"
    corpus: bool = True

    def needs(self) -> Needs:
        return Needs((), prompts=False, corpus=self.corpus, teacher=True, trains=())
