"""Per-token statistics of student and teacher on given answers: one pass each, no full logits, no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.distributed import collectives
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.rollout.local.delta_stream import delta_rows
from minillm.rollout.scoring import batch_statistics
from minillm.teachers.pair import Models
from minillm.teachers.several import takes_turns

Parts = dict[str, Tensor]  # (T, ...) each: of the teacher's rows of a sequence
NEEDS_TEACHER = frozenset({"teacher_logprob", "reverse_kl", "forward_kl", "teacher_entropy", "teacher_argmax"})


@torch.no_grad()
def token_statistics(
    models: Models,
    sequences: Sequence[TokenSequence],
    fields: tuple[str, ...],
    *,
    batch_size: int,
    teacher_parts: Sequence[Parts] | None = None,
) -> dict[str, list[Tensor]]:
    """{field: one (T,) fp32 CPU tensor a sequence, in nats} over the response tokens, at temperature 1.

    `fields` are those of minillm.losses.TokenStats. `teacher_parts` are what the teacher said where that is kept from
    before (`kept_teacher_rows`); without them the teacher is asked, if a field needs it.
    """
    results: dict[str, list[Tensor]] = {field: [torch.empty(0)] * len(sequences) for field in fields}
    needs_teacher = bool(NEEDS_TEACHER & set(fields))
    micro_batches = _micro_batches(models, sequences, batch_size)
    if needs_teacher and teacher_parts is None:
        _take_turns(models, sequences, micro_batches)
    with models.reading("student", *(("teacher",) if needs_teacher else ())):
        for chosen in micro_batches:
            batch = _batch(models, sequences, chosen)
            rows = None
            if needs_teacher and teacher_parts is None:
                rows = models.teacher.rows(batch)
            elif needs_teacher:
                joined = {
                    name: torch.cat([teacher_parts[index][name] for index in chosen]).to(models.device)
                    for name in teacher_parts[chosen[0]]
                }
                rows = models.teacher.rows_of(joined)
            shift = None if models.delta is None else delta_rows(models.delta, batch)
            stats = batch_statistics(models, batch, rows, fields, shift)
            for field in fields:
                _put(results[field], chosen, batch, getattr(stats, field))
    if collectives.world_size() == 1:
        return results
    mine = collectives.rank_slice(len(sequences))
    joined = {
        field: torch.cat([torch.empty(0), *(vectors[index] for index in mine)]) for field, vectors in results.items()
    }
    lengths = torch.tensor([len(sequences[index].response) for index in mine], dtype=torch.int64)
    parts = collectives.gather_tensors({**joined, "lengths": lengths})
    return {
        field: collectives.interleave(
            [part[field].split(part["lengths"].tolist()) if len(part["lengths"]) else () for part in parts]
        )
        for field in fields
    }


@torch.no_grad()
def kept_teacher_rows(models: Models, sequences: Sequence[TokenSequence], *, batch_size: int) -> list[Parts]:
    """The teacher's words at the response tokens, to be kept: the parts of its rows, (T, ...) CPU tensors a sequence.

    Of several ranks each has those of its own slice, which are the ones that `token_statistics` asks it for.
    """
    kept: list[Parts] = [{} for _ in sequences]
    micro_batches = _micro_batches(models, sequences, batch_size)
    _take_turns(models, sequences, micro_batches)
    with models.reading("teacher"):
        for chosen in micro_batches:
            batch = _batch(models, sequences, chosen)
            for name, tensor in models.teacher.rows(batch).parts().items():
                of_sequences: list[Tensor] = [torch.empty(0)] * len(sequences)
                _put(of_sequences, chosen, batch, tensor)
                for index in chosen:
                    kept[index][name] = of_sequences[index]
    return kept


def _micro_batches(models: Models, sequences: Sequence[TokenSequence], batch_size: int) -> list[list[int]]:
    """Indices of this rank's sequences, those of a like length side by side, so that little is padded."""
    count = len(sequences)
    todo = collectives.even_rank_slice(count) if models.by_layers else collectives.rank_slice(count)
    by_length = sorted(todo, key=lambda index: sequences[index].width)
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def _batch(models: Models, sequences: Sequence[TokenSequence], chosen: Sequence[int]) -> TokenBatch:
    return collate([sequences[index] for index in chosen], models.pad_id).to(models.device)


def _take_turns(models: Models, sequences: Sequence[TokenSequence], micro_batches: Sequence[Sequence[int]]) -> None:
    """Have teachers of which one is in memory at a time read all of them beforehand."""
    if takes_turns(models.teacher):
        models.teacher.take_turns(_batch(models, sequences, chosen) for chosen in micro_batches)


def _put(target: list[Tensor], chosen: list[int], batch: TokenBatch, values: Tensor) -> None:  # (N, ...)
    for index, vector in zip(chosen, batch.split(values.cpu()), strict=True):
        target[index] = vector.clone()  # a view would keep the micro-batch's whole tensor alive
