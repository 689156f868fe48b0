"""The needs of a method, as its configuration class declares them from its keys.

Checks, planning, stages, evaluation, report and model card read these declarations. None of them knows a method by its
name.
"""

from dataclasses import dataclass, field
from typing import Literal

from minillm.config.data import TaskKeys
from minillm.config.few_shot import FewShot, Part
from minillm.config.lora import LoraConfig

Sampler = Literal["student", "teacher", "mixture"]
Rows = Literal["answers", "references", "forget", "pairs", "corpus"]
Ability = Literal[
    "read", "sample", "mix", "answer", "logprobs", "hidden", "layers", "weights", "train", "evaluate", "single"
]
Result = Literal["model", "data", "rows"]  # what a stage leaves, as a later one names it

# What a teacher may be able to do beyond giving rows to the losses, as in "a teacher that can ...".
ABILITIES: dict[Ability, str] = {
    "read": "read texts that are made while the stage runs",
    "sample": "answer prompts",
    "mix": "be mixed with the student token by token",
    "answer": "give its answers to the prompts, written once",
    "logprobs": "give the log-probability of any id",
    "hidden": "give its last hidden states",
    "layers": "give hidden states of inner layers",
    "weights": "be run in this process",
    "train": "be trained",
    "evaluate": "be evaluated itself",
    "single": "be the only one",
}


@dataclass(frozen=True)
class TermNeeds:
    """One term of a method's loss, with the texts that its rows come from, and a flag for a teacher that reads them."""

    name: str
    rows: tuple[Rows, ...]  # more than one where steps differ; the longest texts count
    teacher: bool = False
    sequences: int = 1  # of one item: a pair of sampled answers has two
    labels: int = 1  # ids that are scored at every position
    trains: str = "student"  # the model whose rows these are
    summed: bool = False  # the teacher's logits are added to the student's, and nothing else of them is read
    scored: bool = False  # both models are run over the rows without a gradient first
    kept: bool = False  # the teacher reads the rows without the term, and what it says is kept for later passes
    sorts: bool = False  # the probabilities of both models are sorted, row by row
    standardizes: bool = False  # both models' logits are compared standardised, beside a loss of the student's own
    # its teacher may be several: the loss is a sum over rows, the teacher is `Term.teacher` and nothing else, and a row's loss
    # for weights that sum to 1 is the weighted sum of those by each
    shared: bool = False
    prompts: bool = False  # its rows are those of the prompts too, wherever something follows
    features: tuple[tuple[int, int], ...] = ()  # layers of student and teacher that a trained projector each connects
    features_prompts: bool = False  # at prompts too
    affinity: bool = False  # cosines of the last hidden states of both models are compared


@dataclass(frozen=True)
class Needs:
    """Everything that a stage must know of its method before the method exists.

    `because` names, for a field of this class, the key of `method` that the need comes from. Changing that key does away
    with the need.
    """

    terms: tuple[TermNeeds, ...]  # empty where the stage takes no step
    # data
    prompts: bool = True
    references: bool = False  # prompts come with an answer to imitate
    forget: bool = False  # a second set of prompts with answers, which are made less likely
    pairs: bool = False  # prompts come with a chosen and a rejected answer
    corpus: bool = False  # plain text in blocks
    whole_documents: bool = False  # the corpus is read document by document, and not in blocks
    images: bool = False  # prompts show images
    evaluations: bool = False  # the method adapts to evaluations while it trains
    tasks: dict[str, TaskKeys] = field(default_factory=dict)  # that are made of every record, by name
    few_shot: FewShot | None = (
        None  # method.few_shot, by which the teacher is asked in the place of the prompts themselves
    )
    written: tuple[Part, ...] = ()  # parts of the records that are read from the teacher's answers
    # sampling
    samples: tuple[Sampler, ...] = ()  # the samplers that answer prompts while the stage runs, one after the other
    several_answers: bool = False  # it takes rollout.answers_per_prompt answers to each
    written_once: bool = False  # every prompt is answered before the first step, and the answers are kept on disk
    buffered: bool = False  # answers are scored once by both models and used for `inner_epochs`
    as_drawn: bool = False  # of the student's scores the log-probabilities alone, which its own answers are drawn with
    inner_epochs: int = 1
    teacher_share: float = 0.0  # the teacher's weight in a mixture that is sampled
    neutral_sampling: bool = False  # answers must come from the models' own distributions
    weighs_temperature: bool = False  # but for the temperature, of which the method's weights take account
    temperature_key: str = "rollout.temperature"  # the key that sets the temperature of the answers
    # models
    teacher: bool = False
    teacher_abilities: frozenset[Ability] = frozenset()
    reference: str | None = None  # the path, method.reference, of a frozen model that stands on the student's side
    controls_teacher: bool = False  # the student is a delta: what is evaluated is the teacher with its logits added
    other_tokenizer: bool = False  # the teacher may have another one than the student: it reads every text by its own
    teacher_lora: LoraConfig | None = None  # adapters that are put into the teacher, and trained
    auxiliary: bool = False  # the trained model's own auxiliary loss (a router's balance) is part of the loss
    # the loss of a micro-batch is more than the sum of its items': items of a step share one as they come, and not by length
    couples_items: bool = False
    trains: tuple[str, ...] = ("student",)  # models, and modules that the method makes
    leaves: Result | None = None  # of a stage that takes no step; None: data
    because: dict[str, str] = field(default_factory=dict)

    @property
    def takes_steps(self) -> bool:
        """True where the stage trains anything. A stage without terms leaves a result of another kind than a model."""
        return bool(self.terms)

    @property
    def result(self) -> Result:
        """The kind of result that the stage leaves to later ones."""
        return "model" if self.takes_steps else self.leaves or "data"

    @property
    def alone(self) -> bool:
        """True where the teacher is the only model of the stage: what it says is kept, and compared with nothing."""
        return self.result == "rows"

    @property
    def required_abilities(self) -> frozenset[Ability]:
        """The abilities of the teacher beyond giving rows of texts that are known before the stage begins."""
        required = set(self.teacher_abilities)
        if self.teacher and not self.takes_steps or self.controls_teacher:
            required.add("read")
        if self.controls_teacher or self.alone:
            required.add("weights")
        if self.teacher and not self.takes_steps or any(term.teacher and not term.shared for term in self.terms):
            required.add("single")
        # answers that the teacher has written once are texts like any other
        fresh = self.samples and not (self.written_once and set(self.samples) == {"teacher"})
        for term in self.terms:
            if term.teacher and ({"pairs", "forget"} & {*term.rows} or "answers" in term.rows and fresh):
                required.add("read")
            if term.teacher and term.labels > 1:
                required.add("logprobs")
        return frozenset(required)

    @property
    def teacher_reads(self) -> bool:
        """True where the teacher runs over texts of the stage, its own answers included."""
        return any(term.teacher for term in self.terms) or self.teacher_answers

    @property
    def reads_context(self) -> bool:
        """True where the teacher reads data.prompts, and so may be told more of them than the student."""
        if not self.prompts or self.few_shot is not None:
            return False
        reads = any(term.teacher and {"answers", "references"} & {*term.rows} for term in self.terms)
        return reads or self.teacher_answers or self.alone

    @property
    def one_prompt(self) -> str | None:
        """The reason why teacher and student must read the same prompt, as in "method NAME ..."; None where they need not."""
        if "mixture" in self.samples:
            return "samples every token from a mixture of teacher and student, which reads one text"
        if self.controls_teacher:
            return "adds the student's logits to the teacher's, position by position"
        if "teacher" in self.trains:
            return "trains the teacher on the student's texts"
        if any(term.prompts or term.features_prompts or term.affinity for term in self.terms):
            return "compares student and teacher at the tokens of prompts too"
        return None

    @property
    def teacher_answers(self) -> bool:
        """True where the teacher samples, alone or in a mixture."""
        return not {"teacher", "mixture"}.isdisjoint(self.samples)


class UndeclaredNeeds(TypeError):
    """A method's configuration class that does not declare its needs."""
