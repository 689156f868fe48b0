"""The measurements of sampled answers that a buffer keeps, so that inner epochs never run the teacher: from one pass of
each model, or from what both have said while the answers were sampled."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minillm.distributed import collectives
from minillm.losses import LMHead, TokenStats, linear_logprobs, linear_token_stats
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.rollouts import Answer, Scores
from minillm.teachers.pair import Models
from minillm.teachers.several import SeveralRows, Share, shares_of, takes_turns
from minillm.teachers.teacher import HiddenRows, TeacherRows, require_teacher

FIELDS = ("student_logprob", "teacher_logprob", "reverse_kl")
SAME_LOGPROB = 1e-4  # nats between two ways of computing one


def score(
    models: Models,
    answers: Sequence[Answer],
    *,
    keys: Sequence[int],
    judges: Sequence[str | None] | None = None,
    batch_size: int,
    fields: tuple[str, ...] = FIELDS,
    from_student: bool = False,
) -> RolloutBuffer:
    """Answers with, for each of their T tokens, (T,) fp32 each:

    mixture_logprob, log p~(y_t) as it was sampled; student_logprob, log q_old(y_t); teacher_logprob, log p(y_t);
    reverse_kl, KL(q || p) over the shared vocabulary; all in nats at temperature 1. And what the teacher says of them.
    Answers of a like length share a micro-batch of `batch_size`; the buffer keeps their order. Of several ranks each
    gets all vectors, and the teacher's rows of the answers that it scored (minillm.rollout.rank_items).

    Where answers bring scores along, the teacher is not run, and the student only where what it said token by token is
    not what it says in one pass, to which the first step's ratios refer. The same holds of answers `from_student`.

    Of several teachers with weights the last two are the weighted sums: with teacher_logprob as the reward the policy
    gradient is that of the weighted sum of the reverse KLs.

    Args:
        judges: the name of each answer's teacher, where each has one of several.
        fields: those of FIELDS that are read; the others may be left out, which saves work.
        from_student: the answers were drawn from the student's own distribution at temperature 1, so that their
            log-probabilities are student_logprob.

    Raises UserError without a teacher, ValueError for keys that do not match the answers.
    """
    require_teacher(models.teacher, "scoring answers")
    if len(keys) != len(answers):
        raise ValueError(f"{len(answers)} answers, but {len(keys)} keys")
    mine = collectives.rank_slice(len(answers))
    known = len(answers) > 0 and not collectives.anywhere(any(answers[index].scores is None for index in mine))
    with models.reading("student", *([] if known else ["teacher"])):
        if known and _logprobs_hold(models, answers, mine):
            found = {index: answers[index].scores for index in mine}
        else:
            sampled = (
                not known and from_student and "reverse_kl" not in fields and _logprobs_hold(models, answers, mine)
            )
            options = {"known": known, "fields": fields, "sampled": sampled}
            found = _measure_all(models, answers, judges or [None] * len(answers), batch_size, **options)
    scored = RolloutBuffer(
        Rollout(
            key=keys[index],
            prompt=answers[index].prompt,
            response=answers[index].response,
            ended=answers[index].ended,
            vectors={"mixture_logprob": answers[index].logprobs} | found[index].vectors,
            teacher=found[index].teacher,
            extras=answers[index].extras,
            teacher_prompt=answers[index].teacher_prompt,
            judge=None if judges is None else judges[index],
        )
        for index in mine
    )
    if collectives.world_size() == 1:
        return scored
    bare = RolloutBuffer(replace(rollout, teacher={}, extras={}) for rollout in scored)
    gathered = collectives.gather_tensors(bare.state())
    everyones = collectives.interleave([list(RolloutBuffer.from_state(part)) for part in gathered])
    for index, rollout in enumerate(everyones):
        rollout.extras = answers[index].extras
    for index in mine:
        everyones[index].teacher = found[index].teacher
    return RolloutBuffer(everyones)


def batch_statistics(
    models: Models,
    batch: TokenBatch,
    rows: TeacherRows | SeveralRows | None,
    fields: tuple[str, ...],
    shift: Tensor | None = None,  # (N, H_d)
) -> TokenStats:  # (N,) each
    """Statistics of the rows of a batch, at temperature 1, from one forward pass of the student.

    Args:
        rows: what the teacher says of them, None where no field needs it.
        shift: hidden states of models.delta, whose logits are added to the student's.
    """
    return statistics(models, models.row_hidden("student", batch), batch.labels, rows, fields, shift)


def statistics(
    models: Models,
    hidden: Tensor,  # (N, H_s) the student's last hidden states
    labels: Tensor,  # (N,) int64
    rows: TeacherRows | SeveralRows | None,
    fields: tuple[str, ...],
    shift: Tensor | None = None,  # (N, H_d)
) -> TokenStats:  # (N,) each
    """Statistics at temperature 1 of N predictions of which the hidden states are known; `rows` and `shift` as above."""
    student_head = models.head("student")
    if shift is not None:
        student_head = LMHead.sum_of(student_head, models.delta.head())
    found = []
    for share in shares_of(rows):
        states = share.of(hidden) if shift is None else (share.of(hidden), share.of(shift))
        with share.for_losses() as (said, head):
            if not share.is_empty:
                stats = linear_token_stats(
                    states,
                    student_head,
                    said,
                    head,
                    share.of(labels),
                    fields=fields,
                    vocab_size=models.vocab_size,
                )
                found.append((share, stats))
    return found[0][1] if len(found) == 1 and found[0][0].places is None else _together(found, fields, labels)


def _together(
    found: Sequence[tuple[Share, TokenStats]],
    fields: tuple[str, ...],
    labels: Tensor,  # (N,) int64
) -> TokenStats:  # (N,) each
    """The statistics of several teachers' rows: each its own, or the weighted sums, which of the student are its own too."""
    if any(field.endswith("_argmax") for field in fields):
        raise ValueError("several teachers have no likeliest id together")
    values = {}
    for field in fields:
        parts = [(share, getattr(stats, field)) for share, stats in found]
        if field.startswith("student_") and parts[0][0].places is None:
            values[field] = parts[0][1]
            continue
        values[field] = parts[0][1].new_zeros(len(labels))
        for share, part in parts:
            values[field][slice(None) if share.places is None else share.places] += share.weight * part
    return TokenStats(values)


def _measure_all(
    models: Models,
    answers: Sequence[Answer],
    judges: Sequence[str | None],
    batch_size: int,
    *,
    known: bool,
    fields: tuple[str, ...],
    sampled: bool,
) -> dict[int, Scores]:
    """Scores of this rank's answers by full passes: of the student alone where they are `known`, and of the teacher alone
    where the log-probabilities with which they were `sampled` are the student's."""
    todo = (collectives.even_rank_slice if models.by_layers else collectives.rank_slice)(len(answers))
    order = sorted(todo, key=lambda index: len(answers[index].prompt) + len(answers[index].response))
    found: dict[int, Scores] = {}
    micro_batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def batch_of(chosen: Sequence[int]) -> TokenBatch:
        return _collated(models, [answers[index] for index in chosen], [judges[index] for index in chosen])

    if not known and takes_turns(models.teacher):
        models.teacher.take_turns(map(batch_of, micro_batches))
    for chosen in micro_batches:
        batch = batch_of(chosen)
        if known:
            parts = [answers[index].scores.teacher for index in chosen]
            rows = models.teacher.rows_of({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        else:
            rows = models.teacher.rows(batch)
            said = {name: batch.split(tensor.cpu()) for name, tensor in rows.parts().items()}
            parts = [{name: of_answers[place] for name, of_answers in said.items()} for place in range(len(chosen))]
        here = rows.to(models.device)  # of a served teacher's word too, which has come by now
        if sampled and isinstance(here, HiddenRows):
            drawn = torch.cat([answers[index].logprobs for index in chosen])
            stats = {"student_logprob": drawn, "teacher_logprob": _teacher_logprobs(models, here, batch.labels)}
        else:
            measured = batch_statistics(models, batch, here, fields)
            stats = {name: getattr(measured, name) for name in fields}
        vectors = {name: batch.split(value.cpu()) for name, value in stats.items()}
        for place, index in enumerate(chosen):
            found[index] = Scores(
                {name: of_answers[place].clone() for name, of_answers in vectors.items()}, parts[place]
            )
    return found


def _teacher_logprobs(models: Models, rows: HiddenRows, labels: Tensor) -> Tensor:  # (N,) int64 -> (N,)
    with rows.for_losses() as (hidden, head):
        return linear_logprobs(hidden, head, labels, vocab_size=models.vocab_size)


def _logprobs_hold(models: Models, answers: Sequence[Answer], mine: Sequence[int]) -> bool:
    """True where a full pass of the student over the longest answer of every rank says what is known of it: its scores, or
    the log-probabilities with which it was sampled."""
    if models.student.dtype not in (torch.float32, torch.float64):
        return False  # where rounding alone is more than the tolerance
    longest = max(mine, key=lambda index: len(answers[index].prompt) + len(answers[index].response), default=None)
    if longest is None and not models.by_layers:
        return not collectives.anywhere(False)
    answer = answers[longest or 0]
    batch = _collated(models, [answer], [None])
    logprob = batch_statistics(models, batch, None, ("student_logprob",)).student_logprob.cpu()
    expected = answer.logprobs if answer.scores is None else answer.scores.vectors["student_logprob"]
    apart = longest is not None and not ((logprob - expected).abs().max() <= SAME_LOGPROB)
    return not collectives.anywhere(apart)


def _collated(models: Models, answers: Sequence[Answer], judges: Sequence[str | None]) -> TokenBatch:
    sequences = [
        TokenSequence(
            answer.prompt, answer.response, extras=answer.extras, teacher_prompt=answer.teacher_prompt, judge=judge
        )
        for answer, judge in zip(answers, judges, strict=True)
    ]
    return collate(sequences, models.pad_id).to(models.device)
