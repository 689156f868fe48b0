"""A student and its teacher, as everything above them sees them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm.losses import LMHead
from minillm.models.batch import TokenBatch
from minillm.models.delta import Delta
from minillm.models.modes import sampling_mode
from minillm.models.other_device import elsewhere, head_on, row_hidden_on
from minillm.models.sharded import gathered
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.teachers.several import weights_here
from minillm.teachers.teacher import Teacher, require_ability
from minillm.teachers.vocabularies import SharedVocabulary

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class Models:
    """A student, perhaps a teacher, and what they share."""

    student: PreTrainedModel
    teacher: Teacher | None
    tokenizer: PreTrainedTokenizerBase  # the student's
    vocab_size: int  # ids that both of them know
    eos_ids: tuple[int, ...]  # any of them ends an answer
    pad_id: int
    device: torch.device  # of the losses and of all that is shared, which is the student's
    by_layers: bool = False  # sharded weights are gathered a layer at a time: all ranks run the same forward passes
    vocabulary: SharedVocabulary | None = None  # which of the ids mean the same to both; None: all below vocab_size
    tokenizers: TokenizerPair | None = None  # where the teacher reads its own ids: nothing here is shared with it then
    delta: Delta | None = None  # its logits are added to the student's wherever answers are sampled or measured

    def require_shared(self, name: str, texts: Iterable[Sequence[int]]) -> None:
        """Raises UserError for texts with ids that the two do not share; see SharedVocabulary.require."""
        if self.vocabulary is not None:
            self.vocabulary.require(name, texts)

    def model(self, role: Role) -> PreTrainedModel:
        """The weights of a role. Raises UserError for a teacher that has none in this process."""
        if role == "student":
            return self.student
        require_ability(self.teacher, "weights", "this")
        return self.teacher.model

    def elsewhere(self, role: Role) -> torch.device | None:
        """The device of a role's weights where that is another one than `device`. UserError as `model`."""
        return elsewhere(self.model(role), self.device)

    def head(self, role: Role) -> LMHead:
        """The head of a role on `device`. UserError as `model`."""
        return head_on(self.model(role), self.device)

    def row_hidden(self, role: Role, batch: TokenBatch) -> Tensor:  # (N, H)
        """The last hidden states of a role at the rows of a batch on `device`, where they come to. UserError as `model`."""
        return row_hidden_on(self.model(role), batch, self.device)

    def sampling(self, *roles: Role) -> "Models":
        """The pair for answers of these roles: a teacher that answers alone does so on its own device, so that no token and no
        hidden state crosses to another one."""
        if roles != ("teacher",) or self.teacher is None or self.teacher.model is None:
            return self
        there = self.elsewhere("teacher")
        return self if there is None else replace(self, device=there)

    def teacher_alone(self) -> "Models":
        """The teacher in the student's place, on its own device and beside nobody. Raises UserError as `model`."""
        model = self.model("teacher")
        device = elsewhere(model, self.device) or self.device
        return replace(self, student=model, teacher=None, delta=None, device=device)

    def controlled(self) -> "Models":
        """The teacher with the student's logits added to its own, in the student's place: what a delta is judged by."""
        require_ability(self.teacher, "weights", "measuring a delta")
        delta = Delta(self.student, self.tokenizer, self.vocab_size)
        return replace(self, student=self.teacher.model, delta=delta)

    @contextmanager
    def reading(self, *roles: Role) -> Iterator[None]:
        """The weights of these roles can be run and their heads read, in evaluation mode and without a gradient.

        All ranks must enter and leave together. A teacher without weights in this process needs no such thing.
        """
        here = [self.student] if "student" in roles else []
        here += weights_here(self.teacher) if "teacher" in roles else []
        if "student" in roles and self.delta is not None:
            here.append(self.delta.model)
        with gathered(*here, by_layers=self.by_layers), sampling_mode(here):
            yield
