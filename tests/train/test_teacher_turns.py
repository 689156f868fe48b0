"""Runs whose teachers are in memory one at a time: bit for bit those with all in memory, with one model at a time, and few
of them opened."""

import gc
import weakref

import pytest

from minillm.models.loading import load_teacher
from tests.runs import die_after, in_a_child, train
from tests.train.test_several_teachers_run import (  # noqa: F401  fixtures
    BY_FIELD,
    MIXED,
    folder,
    local,
    recipe,
    students,
)

ONE = ("teachers_by.in_memory=one", "teachers_by.turn_steps=3")


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """Models of teachers that were in memory when one was opened, this one included."""
    alive, counts = weakref.WeakSet(), []

    def counted(*args, **options):
        model = load_teacher(*args, **options)
        alive.add(model)
        counts.append(len(alive))
        return model

    monkeypatch.setattr("minillm.teachers.open.load_teacher", counted)
    return counts


# Of weights: two to look at them, then one for every group or set, for which the one that is there reads first. gkd: four
# steps, of which those on answers end a group.
@pytest.mark.parametrize(
    ("method", "by", "most"),
    [("kd", MIXED, 7), ("minillm", BY_FIELD, 4), ("gkd", MIXED, 4), ("distillm", BY_FIELD, 5)],
)
def test_one_at_a_time_takes_the_steps_of_all_in_memory(method, by, most, recipe, folder, tmp_path, opened):  # noqa: F811
    path = recipe(method, teachers=local(folder, "math", "chat"), teachers_by=by)
    train(path, f"output_dir={tmp_path / 'all'}")
    assert opened.pop() == 2
    opened.clear()
    gc.collect()
    train(path, f"output_dir={tmp_path / 'one'}", *ONE[: 1 if method == "minillm" else 2])
    assert students(tmp_path / "one") == students(tmp_path / "all")
    assert set(opened) == {1}
    assert 2 < len(opened) <= most, len(opened)


def test_a_run_killed_amid_a_group_goes_on_bit_for_bit(recipe, folder, tmp_path):  # noqa: F811
    """And may have all teachers in memory then."""
    keys = {"teachers": local(folder, "math", "chat"), "teachers_by": MIXED, "save": {"steps": 1, "best": False}}
    path = recipe("kd", eval={}, **keys)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_a_child(lambda: train(path, f"output_dir={whole}", *ONE)) == 0

    def die():
        from minillm.train.trainer import StageTrainer

        step = StageTrainer._take_step

        def last(self):
            if self.progress.stage_step == 2:
                die_after(1)
            return step(self)

        StageTrainer._take_step = last
        train(path, f"output_dir={killed}", *ONE)

    assert in_a_child(die) != 0
    assert in_a_child(lambda: train(path, f"output_dir={killed}", resume=True)) == 0
    assert students(killed) == students(whole)
