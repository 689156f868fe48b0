"""The models of a stage on fake tensors: which of their weights are trained, and what stands in for teachers elsewhere."""

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from minillm.config.loader.run_plan import load_run
from minillm.planning.planner import plan_run
from minillm.planning.simulated_models import SimulatedModels
from tests.planning.small import PARAMETERS


@pytest.fixture
def built(recipe, monkeypatch):
    """The models of a plan of a recipe, with keys and groups of its own."""
    found, build = [], SimulatedModels.__init__

    def remembered(self, *arguments):
        build(self, *arguments)
        found.append(self)

    monkeypatch.setattr(SimulatedModels, "__init__", remembered)
    monkeypatch.setattr("minillm.planning.simulate._DONE", {})

    def of(*keys, **groups):
        plan_run(load_run([recipe(**groups)], keys), gpu="cpu")
        return found[-1]

    return of


def test_the_student_alone_is_trained_and_vocabularies_are_cut_to_the_smaller(built):
    models = built()
    assert sum(one.numel() for one in models.trained) == PARAMETERS
    assert models.vocab_sizes == (512, 640) and models.vocab_size == 512
    assert models.of_role("teacher") == ["teacher"] and models.of_role("student") == ["student"] and not models.heads
    assert models.teacher_rows(3).shape == (3, 64)
    with FakeTensorMode(), models.few_layers(["student", "teacher"]) as left_out:
        layers = {name: len(model.model.layers) for name, model in models.by_name.items()}
        assert layers == {"student": 2 - left_out["student"], "teacher": 4 - left_out["teacher"]}
        assert left_out["teacher"] > 0
    assert len(models.by_name["teacher"].model.layers) == 4
