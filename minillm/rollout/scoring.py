"""One pass of each model over finished answers: log-probs, reverse KL, and the teacher's hidden states to keep."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.data.batch import TokenBatch, collate
from minillm.losses import linear_token_stats
from minillm.models.access import last_hidden, lm_head
from minillm.models.pair import Models
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.sampling import Answer

FIELDS = ("student_logprob", "teacher_logprob", "reverse_kl")


@torch.no_grad()
def row_hidden(model, batch: TokenBatch, device: torch.device) -> Tensor:  # (N, H)
    """The last hidden states of the batch's rows."""
    batch = batch.to(device)
    hidden = last_hidden(model, batch.input_ids, batch.attention_mask, batch.position_ids)
    return hidden.flatten(0, 1).index_select(0, batch.rows)


def teacher_hidden(models: Models, batch: TokenBatch) -> Tensor:  # (N, H_t)
    """What the teacher's head would be applied to, for every row of the batch. No gradient."""
    return row_hidden(models.teacher, batch, models.device)


@torch.no_grad()
def score(models: Models, answers: Sequence[Answer], *, keys: Sequence[int], batch_size: int) -> RolloutBuffer:
    """The answers with the vectors student_logprob, teacher_logprob, reverse_kl (both models at temperature 1) and
    mixture_logprob (recorded while sampling), fp32 on the CPU, and the teacher's hidden states."""
    rollouts: dict[int, Rollout] = {}
    by_length = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt) + len(answers[i].response))
    for start in range(0, len(answers), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = collate([(answers[i].prompt, answers[i].response) for i in chosen], models.pad_id)
        kept_by_teacher = teacher_hidden(models, batch)
        stats = linear_token_stats(
            row_hidden(models.student, batch, models.device),
            lm_head(models.student),
            kept_by_teacher,
            lm_head(models.teacher),
            batch.labels.to(models.device),
            fields=FIELDS,
            vocab_size=models.vocab_size,
        )
        vectors = {name: batch.split(getattr(stats, name).cpu()) for name in FIELDS}
        hidden = batch.split(kept_by_teacher.cpu())
        for row, i in enumerate(chosen):
            answer = answers[i]
            own = {name: parts[row].clone() for name, parts in vectors.items()}
            own["mixture_logprob"] = answer.logprobs
            rollouts[i] = Rollout(
                keys[i], answer.prompt, answer.response, answer.ended, own, hidden[row].clone()
            )
    return RolloutBuffer([rollouts[i] for i in range(len(answers))])
