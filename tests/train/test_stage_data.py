"""What a stage asks of its data before any model is read."""

import pytest

from minillm import UserError
from minillm.data.instructions import PromptSet
from minillm.train.stage_data import _require_pictures, _require_references, _with_stage_files
from tests.train.test_stage import EXAMPLES, stage


def test_prompts_without_reference_are_counted_and_the_first_is_named():
    prompts = PromptSet(EXAMPLES, 0, "here")
    with pytest.raises(UserError, match=r"stage 'distil': method sft .* 2 of 3 prompts .* \(the first is number 7\)"):
        _require_references(stage(), prompts, "data.prompts")
    _require_references(stage(), PromptSet(EXAMPLES[:1], 0, "here"), "data.prompts")


def test_prompts_without_picture_are_counted_and_the_first_is_named():
    with pytest.raises(UserError, match=r"stage 'distil': method sft .* 2 of 3 prompts .* \(the first is number 5\)"):
        _require_pictures(stage(), PromptSet(EXAMPLES, 0, "here"))
    _require_pictures(stage(), PromptSet(EXAMPLES[1:2], 0, "here"))


def test_data_of_a_stage_are_the_files_that_it_left(tmp_path):
    folder = tmp_path / "stages" / "chosen"
    folder.mkdir(parents=True)
    prompts = stage(data={"prompts": {"type": "jsonl", "path": "stage:chosen"}}).config.data.prompts
    assert _with_stage_files(prompts, tmp_path).path == str(folder / "*.jsonl*")
    plain = prompts.model_copy(update={"path": "here.jsonl"})
    assert _with_stage_files(plain, tmp_path) is plain
