"""What a stage asks of its data before any model is read."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from minillm import UserError
from minillm.config.loader.run_plan import Stage
from minillm.config.root import StageConfig
from minillm.data.instructions import PromptSet
from minillm.train.stage_data import _require_pictures, _require_references, _with_stage_files, read_stage_data
from tests.train.test_stage import EXAMPLES, stage

PICTURES = Path(__file__).parents[2] / "configs" / "pictures"


def test_prompts_without_reference_are_counted_and_the_first_is_named():
    prompts = PromptSet(EXAMPLES, 0, "here")
    with pytest.raises(UserError, match=r"stage 'distil': method sft .* 2 of 3 prompts .* \(the first is number 7\)"):
        _require_references(stage(), prompts, "data.prompts")
    _require_references(stage(), PromptSet(EXAMPLES[:1], 0, "here"), "data.prompts")


def test_prompts_without_picture_are_counted_and_the_first_is_named():
    with pytest.raises(UserError, match=r"stage 'distil': method sft .* 2 of 3 prompts .* \(the first is number 5\)"):
        _require_pictures(stage(), PromptSet(EXAMPLES, 0, "here"))
    _require_pictures(stage(), PromptSet(EXAMPLES[1:2], 0, "here"))


@pytest.mark.parametrize(
    "parts", [["projector"], ["vision", "projector"], ["feed_forward"], ["language", "vision"], None]
)
def test_what_pictures_alone_pass_through_is_trained_by_prompts_that_all_show_one(parts, tmp_path):
    shown = json.loads((PICTURES / "shapes.jsonl").read_text().splitlines()[0])
    told = {key: value for key, value in shown.items() if key != "image"}

    def read(*lines: dict) -> int:
        (tmp_path / "seen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = StageConfig(
            output_dir="unused", seed=3, method={"name": "sft"}, train={"max_steps": 1},
            student={"init": "random", "config": {"model_type": "llava"}, "tokenizer": str(PICTURES / "processor"), "train": parts},
            data={"prompts": {"type": "jsonl", "path": str(tmp_path / "seen.jsonl"), "template": "chat"}},
        )  # fmt: skip
        return len(read_stage_data(Stage("align", config), tmp_path, datetime.now(UTC)).prompts)

    assert read(shown, shown) == 2
    if parts is None or {"language", "feed_forward"} & {*parts}:
        assert read(shown, told) == 2
        return
    said = r"'align': method sft trains what pictures alone pass through .* 1 of 2 prompts of data.prompts .* number 2"
    with pytest.raises(UserError, match=said):
        read(shown, told)


def test_data_of_a_stage_are_the_files_that_it_left(tmp_path):
    folder = tmp_path / "stages" / "chosen"
    folder.mkdir(parents=True)
    prompts = stage(data={"prompts": {"type": "jsonl", "path": "stage:chosen"}}).config.data.prompts
    assert _with_stage_files(prompts, tmp_path).path == str(folder / "*.jsonl*")
    plain = prompts.model_copy(update={"path": "here.jsonl"})
    assert _with_stage_files(plain, tmp_path) is plain
