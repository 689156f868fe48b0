"""best/ holds the model with the best value of eval.metric so far, and nothing is compared that cannot be."""

import pytest

from minillm.config.loader.run_plan import Stage
from minillm.config.root import StageConfig
from minillm.train.best_model import BestModel
from minillm.train.progress import Progress


@pytest.fixture
def saved():
    """The folders that a model was written to."""
    return []


@pytest.fixture
def notes():
    return []


def stage(metric: str = "rouge_l", *, best: bool = True, **evaluation) -> Stage:
    config = StageConfig(
        output_dir="unused", student={"path": "unused"}, method={"name": "sft"}, train={"max_steps": 1},
        eval={"metric": metric, **evaluation}, save={"best": best},
    )  # fmt: skip
    return Stage("distil", config)


def keep_all(best: BestModel, name: str, values) -> tuple[Progress, list[float]]:
    """Progress after these evaluations, and the best value after each."""
    progress, found = Progress("distil"), []
    for step, value in enumerate(values):
        progress.step = step
        best.keep({name: value}, progress)
        found.append(progress.best and progress.best["value"])
    return progress, found


@pytest.mark.parametrize(
    "metric, values, bests, step",
    [
        ("rouge_l", [2.0, 1.0, 3.0, 3.0], [2.0, 2.0, 3.0, 3.0], 2),  # higher is better; as good is not better
        ("reverse_kl_nats", [2.0, 3.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0], 2),
        ("rouge_l", [-2.0, -1.0, -3.0], [-2.0, -1.0, -1.0], 1),
        ("reverse_kl_nats", [float("nan"), 2.0, float("-inf"), 3.0], [None, 2.0, 2.0, 2.0], 1),
    ],
)
def test_the_best_value_so_far_is_kept(metric, values, bests, step, saved, notes, tmp_path):
    progress, found = keep_all(BestModel(stage(metric), tmp_path, notes.append, saved.append), metric, values)
    assert found == bests
    assert progress.best == {"metric": metric, "value": bests[-1], "step": step, "stage": "distil"}
    assert saved == [tmp_path / "best"] * len({one for one in bests if one is not None}) and not notes


def test_nothing_is_kept_where_nobody_asks(saved, notes, tmp_path):
    progress, _ = keep_all(BestModel(stage(best=False), tmp_path, notes.append, saved.append), "rouge_l", [1.0, 2.0])
    assert progress.best is None and not saved and not notes


def test_a_metric_that_is_not_measured_is_named_once(saved, notes, tmp_path):
    progress, _ = keep_all(
        BestModel(stage("rouge_l"), tmp_path, notes.append, saved.append), "entropy_nats", [1.0, 2.0]
    )
    assert progress.best is None and not saved
    (note,) = notes
    assert "eval.metric=rouge_l" in note


@pytest.mark.parametrize(
    "change, forgets",
    [
        ({"max_new_tokens": 7}, True),
        ({"metric": "loss_nats"}, True),
        ({"steps": 7, "samples": 7, "batch_size": 7}, False),  # how often, how many are shown, how many at once
    ],
)
def test_a_value_of_another_measure_is_not_compared_with(change, forgets, saved, notes, tmp_path):
    progress = Progress("distil", best={"metric": "rouge_l", "value": 1.0, "step": 1, "stage": "distil"})
    before = stage().config.model_dump(mode="json")
    BestModel(stage(**change), tmp_path, notes.append, saved.append).forget_another_measure(before, progress)
    assert (progress.best is None) == forgets and len(notes) == forgets


def test_a_lost_model_is_forgotten(saved, notes, tmp_path):
    progress = Progress("distil", best={"metric": "rouge_l", "value": 1.0, "step": 1, "stage": "distil"})
    best = BestModel(stage(), tmp_path, notes.append, saved.append)
    best.forget_damaged(progress)
    assert progress.best is None and "it is missing" in notes[0]
    best.forget_damaged(progress)
    assert len(notes) == 1  # there is nothing to forget any more
