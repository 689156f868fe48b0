"""One pass of each model over sampled answers: what the buffer keeps, so that inner epochs never run the teacher."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from minillm import UserError
from minillm.distributed import collectives
from minillm.losses import linear_token_stats
from minillm.models.access import lm_head, row_hidden
from minillm.models.batch import TokenBatch, collate
from minillm.models.pair import Models
from minillm.models.sharded import gathered
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.local.decoder import sampling_mode
from minillm.rollout.local.sampling import Answer

FIELDS = ("student_logprob", "teacher_logprob", "reverse_kl")


def score(models: Models, answers: Sequence[Answer], *, keys: Sequence[int], batch_size: int) -> RolloutBuffer:
    """Answers with, for each of their T tokens, (T,) fp32 each:

    mixture_logprob, log p~(y_t) as it was sampled; student_logprob, log q_old(y_t); teacher_logprob, log p(y_t);
    reverse_kl, KL(q || p) over the shared vocabulary; all in nats at temperature 1. And the teacher's hidden states.
    Answers of a like length share a micro-batch of `batch_size`; the buffer keeps their order. Of several ranks each
    gets all vectors, and the hidden states of the answers that it scored (minillm.rollout.rank_items).

    Raises UserError without a teacher, or for keys that do not match the answers.
    """
    _require_teacher(models)
    if len(keys) != len(answers):
        raise UserError(f"{len(answers)} answers, but {len(keys)} keys")
    rollouts: dict[int, Rollout] = {}
    mine = collectives.rank_slice(len(answers))
    todo = collectives.even_rank_slice(len(answers)) if models.by_layers else mine
    order = sorted(todo, key=lambda index: len(answers[index].prompt) + len(answers[index].response))
    both = (models.student, models.teacher)
    with gathered(*both, by_layers=models.by_layers), sampling_mode(both):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([(answers[index].prompt, answers[index].response) for index in chosen], models.pad_id)
            vectors, hidden = _measure(models, batch.to(models.device))
            for place, index in enumerate(chosen):
                answer = answers[index]
                rollouts[index] = Rollout(
                    key=keys[index],
                    prompt=answer.prompt,
                    response=answer.response,
                    ended=answer.ended,
                    vectors={"mixture_logprob": answer.logprobs}
                    | {name: parts[place].clone() for name, parts in vectors.items()},
                    teacher_hidden=hidden[place],
                )
    scored = RolloutBuffer(rollouts[index] for index in mine)
    if collectives.world_size() == 1:
        return scored
    bare = RolloutBuffer(replace(rollout, teacher_hidden=None) for rollout in scored)
    parts = collectives.gather_tensors(bare.state())
    everyones = collectives.interleave([list(RolloutBuffer.from_state(part)) for part in parts])
    for index in mine:
        everyones[index].teacher_hidden = rollouts[index].teacher_hidden
    return RolloutBuffer(everyones)


def teacher_hidden(models: Models, batch: TokenBatch) -> Tensor:  # (N, H_t)
    """The teacher's last hidden states at the N rows of a batch, without a gradient, on the device of the models."""
    _require_teacher(models)
    with sampling_mode([models.teacher]):
        return row_hidden(models.teacher, batch.to(models.device))


def _measure(models: Models, batch: TokenBatch) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    hidden = row_hidden(models.teacher, batch)
    stats = linear_token_stats(
        row_hidden(models.student, batch),
        lm_head(models.student),
        hidden,
        lm_head(models.teacher),
        batch.labels,
        fields=FIELDS,
        vocab_size=models.vocab_size,
    )
    return {name: batch.split(getattr(stats, name).cpu()) for name in FIELDS}, batch.split(hidden.cpu())


def _require_teacher(models: Models) -> None:
    if models.teacher is None:
        raise UserError("this needs the teacher's hidden states, but there is no teacher; configure `teacher`")
