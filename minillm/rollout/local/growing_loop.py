"""The decode loop whose tensors grow and shrink: attention over the tokens that are there, and rows that ended are used anew
while there are prompts, or leave."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from minillm.distributed import collectives
from minillm.rollout.local.growing_batch import GrowingBatch
from minillm.rollout.local.shared_prompts import Extras, in_batches, in_readings, prompt_numbers, prompts_ahead
from minillm.rollout.local.token_drawing import Answer, Sampling
from minillm.teachers.pair import Models

ENDED_FRACTION = 0.25  # of a batch: when so many rows have ended, dropping them repays the copy of the caches


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
    wait take the rows of answers that have ended; when none waits rows leave in groups.

    Raises UserError for logits that are not finite.
    """
    extras = extras or [{}] * len(prompts)
    rows, answers = batch_size or len(prompts), {}
    like = prompt_numbers(prompts, extras) if share_prompts else range(len(prompts))
    first = in_batches(like, rows)[0][1]
    readings = in_readings(like, first, prompts_ahead(rows))
    options = {"waiting": max((len(numbers) for numbers in readings), default=0), "share_prompts": share_prompts}

    def asked(numbers: range) -> tuple:
        return numbers, [prompts[one] for one in numbers], noise(list(numbers)), [extras[one] for one in numbers]

    def collect() -> None:
        answers.update(batch.collect())
        if progress is not None:
            progress(len(answers))

    batch = GrowingBatch(models, sampling, roles, *asked(range(first)), **options)
    while True:
        while not all(batch.live) and (batch.waiting or readings):
            if not batch.waiting:
                collect()
                batch.read_ahead(*asked(readings.pop(0)))
            if batch.waiting:  # else all have ended with their first token
                batch.fill_rows()
        if not (collectives.anywhere(any(batch.live)) if models.by_layers else any(batch.live)):
            break
        # no prompt waits where rows have ended
        if any(batch.live) and batch.live.count(False) >= max(1, ENDED_FRACTION * len(batch.live)):
            collect()
            batch.drop_ended()
        batch.step()
    collect()
    return [answers[number] for number in range(len(prompts))]
