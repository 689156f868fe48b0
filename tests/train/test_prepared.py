"""The result of a stage without steps: found again, and not taken for that of another configuration."""

import pytest
import yaml

from minillm import UserError
from minillm.config.loader.run_plan import Stage, load_run
from minillm.storage.manifest import sign
from minillm.train.prepared import has_no_model, is_prepared, mark_prepared


@pytest.fixture
def stage_of(small_run, tmp_path):
    """The last stage of a configuration with such overrides."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_run(tmp_path, layers=1)))

    def make(*overrides: str) -> Stage:
        return load_run([recipe], list(overrides)).stages[-1]

    return make


@pytest.fixture
def made(stage_of, tmp_path):
    """(stage, its output_dir) with a result."""
    stage, output_dir = stage_of(), tmp_path / "run"
    folder = output_dir / "stages" / stage.name
    folder.mkdir(parents=True)
    (folder / "kept.jsonl").write_text("{}\n")
    mark_prepared(stage, folder)
    sign(folder)
    return stage, output_dir


def test_a_result_is_found_again(made, tmp_path):
    stage, output_dir = made
    assert is_prepared(stage, output_dir) and has_no_model(output_dir / "stages" / stage.name)
    assert not is_prepared(stage, tmp_path / "another")
    model = output_dir / "stages" / "model"
    model.mkdir()
    assert not has_no_model(model)


@pytest.mark.parametrize(
    "override, named",
    [
        ("seed=8", "seed"),
        ("data.prompts.max_prompt_length=15", "data"),
        ("student.attn_implementation=eager", "student"),
    ],
)
def test_one_of_another_configuration_is_refused(made, stage_of, override, named):
    stage, output_dir = made
    with pytest.raises(UserError, match=f"stage '{stage.name}' has left .* under another {named}; undo the change"):
        is_prepared(stage_of(override), output_dir)


def test_what_a_stage_without_steps_does_not_read_may_change(made, stage_of):
    assert is_prepared(stage_of("train.max_steps=99", "log.report_to=[]", "train.learning_rate=1"), made[1])


def test_a_damaged_one_is_refused(made):
    stage, output_dir = made
    (output_dir / "stages" / stage.name / "kept.jsonl").write_text("{]\n")
    with pytest.raises(UserError, match="is not whole .kept.jsonl .*; delete it to have the stage done anew"):
        is_prepared(stage, output_dir)
