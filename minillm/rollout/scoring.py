"""One pass of each model over sampled answers: what the buffer keeps, so that inner epochs never run the teacher."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from minillm.distributed import collectives
from minillm.losses import LMHead, TokenStats, linear_token_stats
from minillm.models.access import lm_head, row_hidden
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.rollouts import Answer
from minillm.teachers.pair import Models
from minillm.teachers.teacher import TeacherRows, require_teacher

FIELDS = ("student_logprob", "teacher_logprob", "reverse_kl")


def score(models: Models, answers: Sequence[Answer], *, keys: Sequence[int], batch_size: int) -> RolloutBuffer:
    """Answers with, for each of their T tokens, (T,) fp32 each:

    mixture_logprob, log p~(y_t) as it was sampled; student_logprob, log q_old(y_t); teacher_logprob, log p(y_t);
    reverse_kl, KL(q || p) over the shared vocabulary; all in nats at temperature 1. And what the teacher says of them.
    Answers of a like length share a micro-batch of `batch_size`; the buffer keeps their order. Of several ranks each
    gets all vectors, and the teacher's rows of the answers that it scored (minillm.rollout.rank_items).

    Raises UserError without a teacher, ValueError for keys that do not match the answers.
    """
    require_teacher(models.teacher, "scoring answers")
    if len(keys) != len(answers):
        raise ValueError(f"{len(answers)} answers, but {len(keys)} keys")
    rollouts: dict[int, Rollout] = {}
    mine = collectives.rank_slice(len(answers))
    todo = collectives.even_rank_slice(len(answers)) if models.by_layers else mine
    order = sorted(todo, key=lambda index: len(answers[index].prompt) + len(answers[index].response))
    with models.reading("student", "teacher"):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            sequences = [
                TokenSequence(answers[index].prompt, answers[index].response, extras=answers[index].extras)
                for index in chosen
            ]
            batch = collate(sequences, models.pad_id)
            vectors, rows = _measure(models, batch.to(models.device))
            parts = {name: batch.split(tensor.cpu()) for name, tensor in rows.parts().items()}
            for place, index in enumerate(chosen):
                answer = answers[index]
                rollouts[index] = Rollout(
                    key=keys[index],
                    prompt=answer.prompt,
                    response=answer.response,
                    ended=answer.ended,
                    vectors={"mixture_logprob": answer.logprobs}
                    | {name: of_answers[place].clone() for name, of_answers in vectors.items()},
                    teacher={name: of_answers[place] for name, of_answers in parts.items()},
                    extras=answer.extras,
                )
    scored = RolloutBuffer(rollouts[index] for index in mine)
    if collectives.world_size() == 1:
        return scored
    bare = RolloutBuffer(replace(rollout, teacher={}, extras={}) for rollout in scored)
    gathered = collectives.gather_tensors(bare.state())
    everyones = collectives.interleave([list(RolloutBuffer.from_state(part)) for part in gathered])
    for index, rollout in enumerate(everyones):
        rollout.extras = answers[index].extras
    for index in mine:
        everyones[index].teacher = rollouts[index].teacher
    return RolloutBuffer(everyones)


def batch_statistics(
    models: Models,
    batch: TokenBatch,
    rows: TeacherRows | None,
    fields: tuple[str, ...],
    shift: Tensor | None = None,  # (N, H_d)
) -> TokenStats:  # (N,) each
    """Statistics of the rows of a batch, at temperature 1, from one forward pass of the student.

    Args:
        rows: what the teacher says of them, None where no field needs it.
        shift: hidden states of models.delta, whose logits are added to the student's.
    """
    hidden, student_head = row_hidden(models.student, batch), lm_head(models.student)  # (N, H_s)
    if shift is not None:
        hidden, student_head = (hidden, shift), LMHead.sum_of(student_head, models.delta.head())
    with nullcontext((None, None)) if rows is None else rows.for_losses() as (said, head):
        return linear_token_stats(
            hidden,
            student_head,
            said,
            head,
            batch.labels,
            fields=fields,
            vocab_size=models.vocab_size,
        )


def _measure(models: Models, batch: TokenBatch) -> tuple[dict[str, list[Tensor]], TeacherRows]:
    rows = models.teacher.rows(batch)
    stats = batch_statistics(models, batch, rows, FIELDS)
    return {name: batch.split(getattr(stats, name).cpu()) for name in FIELDS}, rows
