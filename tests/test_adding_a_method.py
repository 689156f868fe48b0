"""docs/adding_a_method.md does what it says: its blocks, taken from the page, are a method that trains and goes on."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm.methods import register
from tests.runs import records, train

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_method.md"


@pytest.fixture(scope="module")
def page():
    """The page's blocks: the configuration class, the method's class, the recipe."""
    blocks = re.findall(r"```(python|yaml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (keys, method), (recipe,) = ([text for kind, text in blocks if kind == wanted] for wanted in ("python", "yaml"))
    from minillm.config.root import StageConfig

    module: dict = {}
    exec(compile(keys, str(PAGE), "exec"), module)
    exec(compile(method, str(PAGE), "exec"), module)
    field = StageConfig.model_fields["method"]
    before = field.annotation
    register(module["KEYS"], module["METHOD"])
    yield recipe
    field.annotation = before  # messages that list the methods are other tests'
    StageConfig.model_rebuild(force=True)


def test_the_method_of_the_page_trains_and_goes_on_bit_for_bit(page, tmp_path):
    recipe = tmp_path / "annealed.yaml"
    recipe.write_text(page)
    whole, _ = train(recipe, f"output_dir={tmp_path / 'whole'}")
    train(recipe, f"output_dir={tmp_path / 'broken'}", "stages.distil.train.max_steps=2")
    broken, _ = train(recipe, f"output_dir={tmp_path / 'broken'}", resume=True)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = [one for one in records(tmp_path / "broken") if one["stage"] == "distil"]
    assert found == [one for one in records(tmp_path / "whole") if one["stage"] == "distil"]
    weights = [one["teacher_weight"] for one in found if one["kind"] == "train"]
    assert weights == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_method_of_the_page_is_planned_and_described(page, tmp_path):
    from minillm.config.loader.run_plan import load_run
    from minillm.planning.planner import plan_run

    recipe = tmp_path / "annealed.yaml"
    recipe.write_text(page)
    stages = plan_run(load_run([recipe]), gpu="cpu").stages
    assert [term.teacher for term in stages[-1].work.terms] == [True]
    train(recipe, f"output_dir={tmp_path / 'run'}")
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "distillation that moves from references to the teacher" in card
    assert json.loads(json.dumps(yaml.safe_load(page)))["stages"]["distil"]["method"]["name"] == "annealed"
