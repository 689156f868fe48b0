"""The decode loop whose tensors grow and shrink: attention over the tokens that are there, and rows that ended are used anew
while there are prompts, or leave."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from minillm.distributed import collectives
from minillm.rollout.local.growing_batch import GrowingBatch
from minillm.rollout.local.shared_prompts import Extras, prompt_numbers, whole_groups
from minillm.rollout.local.token_drawing import Answer, Sampling
from minillm.teachers.pair import Models

ENDED_FRACTION = 0.25  # of a batch: when so many rows have ended, dropping them repays the copy of the caches
IDLE_STEPS = 0.25  # of a batch: when rows that ended have sat through so many, new prompts repay a pass to read them


def decode(
    models: Models,
    sampling: Sampling,
    roles: Mapping[str, float],  # the models that take part, and their weights
    prompts: Sequence[list[int]],
    noise: Callable[[list[int]], Tensor],  # from numbers of prompts to (any, max_new_tokens) float64, CPU
    extras: Extras = (),
    *,
    batch_size: int | None = None,  # rows side by side; None: one for each prompt
    share_prompts: bool = False,  # those that are alike stand next to each other, and are read once
    progress: Callable[[int], None] | None = None,  # called with the number of answers that are done
) -> list[Answer]:
    """An answer for each prompt. Where there are more prompts than rows they must come longest first, and those that
    wait take the rows of answers that have ended; then rows leave in groups.

    Raises UserError for logits that are not finite.
    """
    extras = extras or [{}] * len(prompts)
    waiting, answers = list(range(len(prompts))), {}
    like = prompt_numbers(prompts, extras) if share_prompts else waiting.copy()

    def fitting(rows: int) -> int:
        """The number of the next prompts that there are rows for; those that are alike are taken together."""
        return whole_groups([like[one] for one in waiting[: rows + 1]], rows)

    def take(rows: int) -> tuple:
        numbers = waiting[:rows]
        del waiting[:rows]
        return numbers, [prompts[one] for one in numbers], noise(numbers), [extras[one] for one in numbers]

    options = {"refills": batch_size is not None, "share_prompts": share_prompts}
    while waiting:
        rows = batch_size or len(prompts)
        batch = GrowingBatch(models, sampling, roles, *take(fitting(rows) or rows), **options)
        idle = 0
        while collectives.anywhere(any(batch.live)) if models.by_layers else any(batch.live):
            ended = batch.live.count(False)
            idle += ended
            fit = fitting(ended) if ended and waiting and idle >= IDLE_STEPS * len(batch.live) else 0
            if fit:
                answers |= batch.answers()
                if progress is not None:
                    progress(len(answers))
                batch.refill(*take(fit))
                idle = 0
            elif not waiting and ended and ended >= ENDED_FRACTION * len(batch.live) and any(batch.live):
                answers |= batch.answers()
                batch.drop_ended()
            batch.step()
        answers |= batch.answers()
        if progress is not None:
            progress(len(answers))
    return [answers[number] for number in range(len(prompts))]
