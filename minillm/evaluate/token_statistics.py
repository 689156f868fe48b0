"""Per-token statistics of student and teacher on given answers: one pass each, no full logits, no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.distributed import collectives
from minillm.losses import linear_token_stats
from minillm.models.access import lm_head, row_hidden
from minillm.models.batch import Pair, TokenBatch, collate
from minillm.models.pair import Models
from minillm.models.sharded import gathered
from minillm.rollout.scoring import teacher_hidden

NEEDS_TEACHER = frozenset({"teacher_logprob", "reverse_kl", "forward_kl", "teacher_entropy", "teacher_argmax"})


@torch.no_grad()
def token_statistics(
    models: Models,
    pairs: Sequence[Pair],
    fields: tuple[str, ...],
    *,
    batch_size: int,
    teacher_states: Sequence[Tensor] | None = None,  # (T, H_t) each
) -> dict[str, list[Tensor]]:
    """{field: one (T,) fp32 CPU tensor a pair, in nats} over the response tokens, at temperature 1.

    `fields` are those of minillm.losses.TokenStats. `teacher_states` are the teacher's hidden states where they are
    kept from before (`teacher_hidden_states`); without them the teacher runs, if a field needs it.
    """
    results: dict[str, list[Tensor]] = {field: [torch.empty(0)] * len(pairs) for field in fields}
    needs_teacher = bool(NEEDS_TEACHER & set(fields))
    with gathered(models.student, models.teacher if needs_teacher else None, by_layers=models.by_layers):
        _measure(results, _micro_batches(models, pairs, batch_size), models, pairs, teacher_states)
    if collectives.world_size() == 1:
        return results
    mine = collectives.rank_slice(len(pairs))
    joined = {
        field: torch.cat([torch.empty(0), *(vectors[index] for index in mine)]) for field, vectors in results.items()
    }
    lengths = torch.tensor([len(pairs[index][1]) for index in mine], dtype=torch.int64)
    parts = collectives.gather_tensors({**joined, "lengths": lengths})
    return {
        field: collectives.interleave(
            [part[field].split(part["lengths"].tolist()) if len(part["lengths"]) else () for part in parts]
        )
        for field in fields
    }


def _measure(
    results: dict[str, list[Tensor]],
    batches: Sequence[Sequence[int]],
    models: Models,
    pairs: Sequence[Pair],
    teacher_states: Sequence[Tensor] | None,
) -> None:
    fields = tuple(results)
    needs_teacher = bool(NEEDS_TEACHER & set(fields))
    for chosen in batches:
        batch = collate([pairs[index] for index in chosen], models.pad_id)
        if not needs_teacher:
            teacher = None
        elif teacher_states is None:
            teacher = teacher_hidden(models, batch)
        else:
            teacher = torch.cat([teacher_states[index] for index in chosen]).to(models.device)
        stats = linear_token_stats(
            row_hidden(models.student, batch.to(models.device)),  # (N, H_s)
            lm_head(models.student),
            teacher,  # (N, H_t)
            lm_head(models.teacher) if needs_teacher else None,
            batch.labels.to(models.device),
            fields=fields,
            vocab_size=models.vocab_size,
        )
        for field in fields:
            _put(results[field], chosen, batch, getattr(stats, field))


@torch.no_grad()
def teacher_hidden_states(models: Models, pairs: Sequence[Pair], *, batch_size: int) -> list[Tensor]:
    """The teacher's last hidden states at the response tokens, to be kept: one (T, H_t) CPU tensor a pair.

    Of several ranks each has those of its own share, which are the ones that `token_statistics` asks it for.
    """
    states: list[Tensor] = [torch.empty(0)] * len(pairs)
    with gathered(models.teacher, by_layers=models.by_layers):
        for chosen in _micro_batches(models, pairs, batch_size):
            batch = collate([pairs[index] for index in chosen], models.pad_id)
            _put(states, chosen, batch, teacher_hidden(models, batch))
    return states


def _micro_batches(models: Models, pairs: Sequence[Pair], batch_size: int) -> list[list[int]]:
    """Indices of this rank's pairs, those of a like length side by side, so that little is padded."""
    todo = collectives.even_rank_slice(len(pairs)) if models.by_layers else collectives.rank_slice(len(pairs))
    by_length = sorted(todo, key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def _put(target: list[Tensor], chosen: list[int], batch: TokenBatch, values: Tensor) -> None:  # (N, ...)
    for index, vector in zip(chosen, batch.split(values.cpu()), strict=True):
        target[index] = vector.clone()  # a view would keep the micro-batch's whole tensor alive
