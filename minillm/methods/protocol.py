"""The protocol of a method: what to train on, and the terms of its loss. docs/methods.md says every planned method in it.

A method never runs a backward pass, reads no file of its own, knows no rank, and never asks which engine runs it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from minillm.config.root import StageConfig
from minillm.data.documents import Documents
from minillm.data.stream import RankSlice, Stream
from minillm.distributed import collectives
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.models.device import moved
from minillm.rollout.buffer import RolloutBuffer
from minillm.rollout.rollouts import ProgressCallback, Rollouts
from minillm.storage.timing import Timing
from minillm.teachers.pair import Models
from minillm.teachers.several import SeveralRows
from minillm.teachers.teacher import HiddenRows, TeacherRows

Objective = Callable[..., Tensor | tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class HiddenLoss:
    """A loss over hidden states of the model that a term trains, from the forward pass that the term runs anyway.

    objective(hidden, batch, modules, **inputs) is a scalar, or (scalar, {metric: scalar}); the engine divides the scalar
    by the term's divisor and the metrics by its rows. `hidden` is {layer: (B, L, H)}: layer 0 is what the first layer reads, layer n
    what the n-th gives, and the last one, also named -1, is what the head reads.
    """

    layers: tuple[int, ...]
    objective: Callable[..., Tensor | tuple[Tensor, dict[str, Tensor]]]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # such as hidden states of the teacher


@dataclass(frozen=True)
class HeadLoss:
    """A loss over the last hidden states and the heads of student and teacher, whose rows and ids need not be the same.

    objective(hidden, head, teacher_hidden, teacher_head, **inputs) is a scalar, or (scalar, {metric: scalar}); the engine
    divides the scalar by the term's divisor and the metrics by its rows. `hidden` are the term's N rows, (N, H_s), and
    `teacher_hidden` those given here, (M, H_t).
    """

    objective: Callable[..., Tensor | tuple[Tensor, dict[str, Tensor]]]
    teacher: HiddenRows  # M rows
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # of any shape


@dataclass(frozen=True)
class Term:
    """One summand of the loss: weight * sum over rows of objective(stats, **inputs) / divisor.

    The divisor is the sum of `count` over all micro-batches and ranks of the step: the engine adds them up, so that
    one big batch and its micro-batches give the same gradient.
    """

    name: str
    batch: TokenBatch  # N rows
    objective: Objective  # per-row loss (N,), or (loss, {metric: (N,)}), from minillm.losses.TokenStats
    fields: tuple[str, ...]  # the statistics that the objective reads
    count: float
    weight: float = 1.0
    inputs: dict[str, Tensor] = field(default_factory=dict)  # (N,) each
    teacher: TeacherRows | SeveralRows | None = None  # N rows, where a field needs the teacher
    template: HiddenRows | None = None  # N rows of a frozen model whose logits are added to those of the trained one
    options: dict[str, Any] = field(default_factory=dict)  # beta, alpha, temperature of linear_objective
    trains: str = "student"  # which of the stage's trained models stands on the student's side
    coupled: bool = False  # the objective sees all N rows at once, and may couple them
    hidden: HiddenLoss | None = None
    heads: HeadLoss | None = None
    auxiliary: float = 0.0  # weight of the model's own auxiliary loss, a mean over its tokens: a router's balance

    def to(self, device: torch.device) -> "Term":
        """The term with its tensors on `device`."""
        hidden, heads = self.hidden, self.heads
        if hidden is not None:
            hidden = replace(hidden, inputs={name: one.to(device) for name, one in hidden.inputs.items()})
        if heads is not None:
            inputs = {name: one.to(device) for name, one in heads.inputs.items()}
            heads = replace(heads, teacher=heads.teacher.to(device), inputs=inputs)
        return replace(
            self,
            batch=self.batch.to(device),
            inputs={name: moved(tensor, device) for name, tensor in self.inputs.items()},
            teacher=None if self.teacher is None else self.teacher.to(device),
            template=None if self.template is None else self.template.to(device),
            hidden=hidden,
            heads=heads,
        )


@dataclass(frozen=True)
class TrainingData:
    """The material of a method. The streams carry their own position."""

    prompts: Stream | None  # of minillm.data.instructions.Example
    corpus: Stream | RankSlice | None  # of token blocks: list[int]
    rollouts: Rollouts  # what samples
    folder: Path  # of this stage alone: for what is made once and kept
    report_progress: ProgressCallback = lambda what, done, total: None  # told how far long work inside `collect` is
    timing: Timing = field(default_factory=Timing)  # told what that work was
    pairs: Stream | None = None  # of minillm.data.pairs.AnswerPair
    documents: Documents | None = None  # of data.corpus, whole and in order: in the place of its blocks
    tokenizer: PreTrainedTokenizerBase | None = None  # that the texts were read with
    forget: Stream | None = None  # of Example: answers to be made less likely


class Item(Protocol):
    """The parts of one example of a step: a TokenSequence, a Rollout, a pair of answers, or a method's own."""

    key: int  # of its prompt: named where something is wrong with it

    @property
    def width(self) -> int:
        """Tokens of its longest text, prompt and response: items of like widths share a micro-batch."""


@dataclass(frozen=True)
class Observation:
    """An event that a method hears of: a step that was taken, or an evaluation of the student."""

    kind: Literal["step", "evaluation"]
    metrics: Mapping[str, float]  # of the step over all ranks, or the evaluation's means over its sets
    step: int  # of the stage: so many are taken


class Method(ABC):
    """See the module. `step_size` is the number of items of one optimiser step over all micro-batches and ranks."""

    def __init__(self, config: StageConfig):
        self.config = config
        self.needs = config.method.needs()
        self.answers_per_prompt = config.rollout.answers_per_prompt if self.needs.several_answers else 1
        self.step_size = (
            config.train.per_device_train_batch_size
            * config.train.gradient_accumulation_steps
            * collectives.world_size()
        )

    def modules(self, models: Models) -> dict[str, nn.Module]:
        """Modules that are trained beside the student, by name: a projector, the teacher with its adapters.

        They are made alike on every rank. Their weights that require a gradient are in the optimiser, and lie in
        `modules/` of checkpoints and models. A Term names one as `trains` where it is a language model.
        """
        return {}

    def learning_rates(self) -> dict[str, float]:
        """The highest learning rate of those modules that have another than train.learning_rate."""
        return {}

    @abstractmethod
    def collect(self, data: TrainingData, models: Models, draw: int) -> Sequence[Item] | RolloutBuffer:
        """The items of the next steps; `draw` counts the collections of this run and keys their randomness.

        What lasts for more than one step must be a RolloutBuffer, or part of `state_dict`: checkpoints carry those.
        """

    def foreseeable(self, draw: int) -> bool:
        """True where `collect` of that draw runs no model and changes nothing but the positions of the streams, so that
        what it will return may be asked for, and put back, a step before."""
        return False

    def teacher_batch(self, items: Sequence[Item], models: Models) -> TokenBatch:
        """The batch whose rows the terms of a micro-batch ask the teacher for, so that it may be told of them beforehand."""
        return collate(sequences_of(items), models.pad_id)

    @abstractmethod
    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        """The loss of one micro-batch of items, those of like lengths among a step's.

        What the items of a step give must not depend on how it is cut, unless Needs.couples_items says that it does.
        """

    def observe(self, observation: Observation) -> dict[str, float]:
        """Adapt thresholds or interpolation times; returns numbers for the records. Alike on every rank."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state that `observe` and replay buffers keep: tensors, numbers, texts, lists and dicts, alike on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but a checkpoint holds {sorted(state)} of it")

    def prepare(self, data: TrainingData, models: Models, folder: Path) -> None:
        """The whole work of a stage that takes no step: its result goes into `folder`, which is published when it returns.

        What must survive a kill is kept in data.folder: after one, `prepare` begins again with what is there.
        """
        raise NotImplementedError(f"{type(self).__name__} declares no terms, so it must define `prepare`")


def sequences_of(items: Sequence[Any]) -> list[TokenSequence]:
    """The token sequences of items that have one each."""
    return [item if isinstance(item, TokenSequence) else item.sequence for item in items]
