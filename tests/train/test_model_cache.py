"""One teacher and one evaluator in memory: when they are opened, handed out again, and closed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.config.models import TeacherConfig
from minillm.train import model_cache
from minillm.train.model_cache import ModelCache, teacher_identity

CPU, HERE, THERE = torch.device("cpu"), Path("here"), Path("there")
ONE, OTHER, TAUGHT = (TeacherConfig(path=path) for path in ("org/one", "org/other", "stage:teacher"))


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What was opened and closed, in order."""
    found: list[str] = []

    def open_teacher(config, *, output_dir, device, sharded):
        found.append(f"open {config.path}")
        return SimpleNamespace(teacher=SimpleNamespace(close=lambda: found.append(f"close {config.path}")))

    monkeypatch.setattr(model_cache, "open_teacher", open_teacher)
    return found


def test_an_equal_teacher_is_handed_out_again(events):
    cache = ModelCache()
    first = cache.teacher(ONE, HERE, CPU)
    assert cache.teacher(ONE.model_copy(), THERE, CPU) is first and events == ["open org/one"]
    assert cache.teacher(None, HERE, CPU) is None and cache.teacher(ONE, HERE, CPU) is first


def test_the_one_before_is_closed_before_another_is_opened(events):
    cache = ModelCache()
    for config in (ONE, OTHER, OTHER.model_copy(update={"dtype": "bfloat16"})):
        cache.teacher(config, HERE, CPU)
    assert events == ["open org/one", "close org/one", "open org/other", "close org/other", "open org/other"]


def test_what_a_stage_has_left_is_of_its_run_alone(events):
    cache = ModelCache()
    assert cache.teacher(TAUGHT, HERE, CPU) is cache.teacher(TAUGHT, HERE, CPU)
    cache.teacher(TAUGHT, THERE, CPU)
    assert events == ["open stage:teacher", "close stage:teacher", "open stage:teacher"]
    tokenized = ONE.model_copy(update={"tokenizer": "stage:teacher"})
    assert teacher_identity(tokenized, HERE) != teacher_identity(tokenized, THERE)
    assert teacher_identity(None, HERE) == teacher_identity(None, THERE)


def test_one_that_is_sharded_is_another(events):
    cache = ModelCache()
    assert cache.teacher(ONE, HERE, CPU) is not cache.teacher(ONE, HERE, CPU, sharded=True)


def test_one_that_is_trained_is_nobody_elses(events):
    cache = ModelCache()
    kept = cache.teacher(ONE, HERE, CPU)
    trained = cache.teacher(ONE, HERE, CPU, trained=True)
    again = cache.teacher(ONE, HERE, CPU)
    assert len({id(kept), id(trained), id(again)}) == 3 and again is cache.teacher(ONE, HERE, CPU)
    assert events == ["open org/one", "close org/one", "open org/one", "open org/one"]


def test_closing_gives_the_memory_back_once(events):
    cache = ModelCache()
    cache.close()
    cache.teacher(ONE, HERE, CPU)
    cache.close()
    cache.close()
    assert events == ["open org/one", "close org/one"]


def test_the_evaluator_of_an_equal_key_is_kept():
    cache = ModelCache()
    first = cache.evaluator((1, "a"), object)
    assert cache.evaluator((1, "a"), lambda: pytest.fail("made again")) is first
    second = cache.evaluator((2, "a"), object)
    assert second is not first and cache.evaluator((1, "a"), object) not in (first, second)
