"""The module an engine wraps: its forward is the loss, so that the head's weight is read inside that forward.

That is the one form that is right for a plain model and for one whose weights are sharded.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from minillm.losses import linear_objective
from minillm.methods.protocol import Term
from minillm.models.access import lm_head, row_hidden
from minillm.models.sharded import fully_gathered


class StudentLoss(nn.Module):
    """student hidden states -> one term's summed loss and metrics, without full logits."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, *, vocab_size: int, backend: str):
        super().__init__()
        self.student = student
        # a list hides the teacher from parameters(), state_dict() and train(): it is read, never trained
        self._teacher = [teacher]
        self.vocab_size = vocab_size
        self.backend = backend

    def forward(self, term: Term) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the term's rows of its objective, and its metrics summed likewise. Scalars, fp32."""
        batch = term.batch
        hidden = row_hidden(self.student, batch)  # (N, H_s)
        teacher = None if term.teacher_hidden is None else self._teacher[0]
        # gradients are taken in the forward pass, so that the teacher's head is not read again after it
        with fully_gathered(None if teacher is None else teacher.get_output_embeddings()):
            return linear_objective(
                hidden,
                lm_head(self.student),
                term.teacher_hidden,
                None if teacher is None else lm_head(teacher),
                batch.labels,
                term.objective,
                inputs=term.inputs,
                fields=term.fields,
                vocab_size=self.vocab_size,
                kept=len(batch.labels),  # known without asking the device
                backend=self.backend,
                **term.options,
            )


def to_device(term: Term, device: torch.device) -> Term:
    """The term with its tensors on `device`."""
    return replace(
        term,
        batch=term.batch.to(device),
        inputs={name: tensor.to(device, non_blocking=True) for name, tensor in term.inputs.items()},
        teacher_hidden=None if term.teacher_hidden is None else term.teacher_hidden.to(device, non_blocking=True),
    )
