"""What a checkpoint says of a run: it is read strictly, so that a damaged one is not half believed."""

import pytest
from pydantic import ValidationError

from minillm.train.progress import Progress

WHOLE = {"stage": "distil", "step": 3, "streams": {"prompts": {"taken": 6, "items": 8}}, "log": {"metrics.jsonl": 10}}


def test_a_new_stage_has_done_nothing():
    progress = Progress("distil")
    assert (progress.step, progress.stage_step, progress.draw, progress.epoch, progress.position) == (0, 0, 0, 0, 0)
    assert (progress.seconds, progress.student_tokens, progress.finished, progress.best) == (0.0, 0, False, None)
    assert Progress("one").streams is not Progress("other").streams


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": "3"},
        {"step": 3.0},
        {"finished": 1},
        {"streams": {"prompts": {"taken": 6}}},
        {"streams": {"prompts": {"taken": -6, "items": 8}}},
        {"log": {"metrics.jsonl": -1}},
        {"best": {"metric": "rouge_l", "value": 1.0}},
        {"of_a_later_version": 1},
    ],
    ids=str,
)
def test_other_values_are_refused(change):
    assert Progress(**WHOLE).step == 3
    with pytest.raises((ValidationError, TypeError)):
        Progress(**{**WHOLE, **change})
