"""The module an engine wraps: its forward is the loss, so that the head's weight is read inside that forward.

That is the one form that is right for a plain model and for one whose weights are sharded.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minillm.losses import LMHead, linear_objective
from minillm.methods.protocol import HeadLoss, HiddenLoss, Term
from minillm.models.access import forward_layers, lm_head, rows_of
from minillm.models.batch import TokenBatch
from minillm.models.other_device import head_on
from minillm.models.packing import fed_mask
from minillm.models.routers import balance_loss, expert_tokens, experts_of, recorded_routing
from minillm.teachers.several import Share, shares_of
from minillm.teachers.teacher import HiddenRows


class TermLoss(nn.Module):
    """Hidden states of a trained model -> one term's summed loss and metrics, without full logits."""

    def __init__(
        self, student: nn.Module, modules: Mapping[str, nn.Module] | None = None, *, vocab_size: int, backend: str
    ):
        """Args: modules: what is trained beside the student, by the names that terms know them by."""
        super().__init__()
        self.student = student
        self.trained_beside = nn.ModuleDict(modules or {})
        self.vocab_size = vocab_size
        self.backend = backend
        experts = experts_of(student)
        # (layers, E) int64, how often the student's tokens were sent to each expert; None for a dense student
        self.expert_tokens = torch.zeros(len(experts), experts[0].num_experts, dtype=torch.int64) if experts else None

    def forward(self, term: Term) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the term's rows of its objective, and its metrics summed likewise. Scalars, fp32.

        Losses over hidden states and over heads are in the sum, and the model's auxiliary loss, times the term's count.
        """
        model = self.student if term.trains == "student" else self.trained_beside[term.trains]
        batch = term.batch
        with recorded_routing(model) as routing:
            output, states = forward_layers(model, batch, () if term.hidden is None else term.hidden.layers)
        if model is self.student and self.expert_tokens is not None:
            found = expert_tokens(routing, self.expert_tokens.shape[1], fed_mask(model, batch))
            self.expert_tokens = self.expert_tokens.to(found.device) + found
        hidden = rows_of(output.last_hidden_state, batch)  # (N, H_s)
        found = [self._objective(term, share, model, hidden) for share in shares_of(term.teacher)]
        loss, metrics = _summed([one for one in found if one is not None])
        if term.heads is not None:
            of_heads, measured = self._head_loss(term.heads, hidden, lm_head(model))
            loss, metrics = loss + of_heads, {**metrics, **measured}
        if term.hidden is not None:
            of_hidden, measured = self._hidden_loss(term.hidden, states, batch)
            loss, metrics = loss + of_hidden, {**metrics, **measured}
        if term.auxiliary:
            balance = balance_loss(model, routing, fed_mask(model, batch))
            loss = loss + term.auxiliary * term.count * balance
            # a mean over tokens, and metrics are sums over rows
            metrics = {**metrics, "auxiliary_loss": balance.detach() * batch.tokens}
        return loss, metrics

    def _objective(
        self,
        term: Term,
        share: Share,
        model: nn.Module,
        hidden: Tensor,  # (N, H_s)
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The term's objective summed over the rows that one teacher has a word on, times its weight; None where it has none."""
        if term.coupled and share.places is not None:
            raise ValueError(f"the term {term.name!r} couples its rows, which several teachers cannot divide")
        labels, hidden = share.of(term.batch.labels), share.of(hidden)  # (M,), (M, H_s)
        # gradients are taken in the forward pass, so that the teacher's head is not read again after it
        with self._teacher_side(share) as (said, teacher_head), self._teacher_side(Share(term.template)) as added:
            if share.is_empty:
                return None
            head = lm_head(model)
            if term.template is not None:
                hidden, head = (hidden, share.of(added[0])), LMHead.sum_of(head, added[1])
            loss, metrics = linear_objective(
                hidden,
                head,
                said,
                teacher_head,
                labels,
                term.objective,
                inputs={name: share.of(one) for name, one in term.inputs.items()},
                fields=term.fields,
                coupled=term.coupled,
                vocab_size=self.vocab_size,
                kept=len(labels),  # known without asking the device
                backend=self.backend,
                **term.options,
            )
        if share.weight == 1.0:
            return loss, metrics
        return share.weight * loss, {name: share.weight * value for name, value in metrics.items()}

    @contextmanager
    def _teacher_side(self, share: Share) -> Iterator[tuple[object, LMHead | None]]:
        """The teacher's side of the losses. A head of this module is gathered by reading it, as the student's is."""
        rows = share.rows
        if isinstance(rows, HiddenRows) and any(rows.source.model is one for one in self.children_that_train()):
            yield rows.hidden, head_on(rows.source.model, rows.hidden.device)
        else:
            with share.for_losses() as both:
                yield both

    def device_of(self, term: Term) -> torch.device:
        """The device of the model that a term trains, where its tensors must be."""
        model = self.student if term.trains == "student" else self.trained_beside[term.trains]
        return next(model.parameters()).device

    def take_expert_tokens(self) -> Tensor | None:  # (layers, E) int64
        """The number of times that tokens were sent to each expert since the last call; None for a dense student."""
        tokens = self.expert_tokens
        if tokens is not None:
            self.expert_tokens = torch.zeros_like(tokens)
        return tokens

    def children_that_train(self) -> list[nn.Module]:
        """The student and what is trained beside it."""
        return [self.student, *self.trained_beside.values()]

    def _head_loss(self, wanted: HeadLoss, hidden: Tensor, head: LMHead) -> tuple[Tensor, dict[str, Tensor]]:
        with self._teacher_side(Share(wanted.teacher)) as (theirs, teacher_head):
            return _with_metrics(wanted.objective(hidden, head, theirs, teacher_head, **wanted.inputs))

    def _hidden_loss(
        self,
        wanted: HiddenLoss,
        states: dict[int, Tensor],  # (B, L, H) each
        batch: TokenBatch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return _with_metrics(wanted.objective(states, batch, self.trained_beside, **wanted.inputs))


def _summed(parts: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums of losses and of metrics that are sums over rows."""
    (loss, metrics), *others = parts
    for more, measured in others:
        loss = loss + more
        metrics = {name: metrics[name] + measured[name] for name in metrics}
    return loss, metrics


def _with_metrics(result: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    return result if isinstance(result, tuple) else (result, {})
