"""trainer.json goes through a file unchanged; any other content is one line about the key."""

import json
from pathlib import Path

import pytest

from minillm import UserError
from minillm.train.progress import Progress
from minillm.train.trainer_state import TrainerState, read_trainer_state, trainer_state_part

STATE = TrainerState(
    Progress(
        "distil", step=8, stage_step=6, draw=2, seconds=3, best={"metric": "rouge_l", "value": 2.5, "step": 4, "stage": "distil"},
        streams={"prompts": {"taken": 12, "items": 8}}, log={"metrics.jsonl": 900}, stage_configs={"teacher": {"train": {}}},
    ),
    {"train": {"max_steps": 6}, "eval": {}},
    2,
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-8"
    (folder / "state").mkdir(parents=True)
    trainer_state_part(STATE).save(folder / "state")
    return folder


def test_it_goes_through_a_file(checkpoint):
    found = read_trainer_state(checkpoint)
    assert found == STATE
    assert found.position("prompts", checkpoint) == {"taken": 12, "items": 8}
    with pytest.raises(UserError, match="trainer.json: it has no 'corpus'"):
        found.position("corpus", checkpoint)


def test_a_checkpoint_of_before_there_were_ranks_is_of_one_process(checkpoint):
    path = checkpoint / "state" / "trainer.json"
    content = json.loads(path.read_text())
    del content["world_size"]
    path.write_text(json.dumps(content))
    assert read_trainer_state(checkpoint).world_size == 1


@pytest.mark.parametrize(
    "place, value, words",
    [
        ("progress.step", "8", "progress.step: Input should be a valid integer"),
        ("progress.position", -1, "progress.position: Input should be greater than or equal to 0"),
        ("progress.stage_step", 9, "progress.stage_step is 9, but progress.step only 8"),
        ("progress.steps", 3, "progress.steps: Unexpected"),
        ("progress.best.value", None, "progress.best.value: Input should be a valid number"),
        ("progress.streams.prompts", {"items": 8}, "progress.streams.prompts.taken: Field required"),
        ("progress.log", [], "progress.log: Input should be a valid dictionary"),
        ("progress", [], "progress is not a JSON object"),
        ("config.train", 3, "config.train is not there"),
        ("config", None, "config.train is not there"),
        ("world_size", 0, "world_size is 0, not a number of ranks"),
    ],
)
def test_any_other_content_is_told_by_its_key(checkpoint, place, value, words):
    path = checkpoint / "state" / "trainer.json"
    content = json.loads(path.read_text())
    *groups, key = place.split(".")
    inner = content
    for group in groups:
        inner = inner[group]
    inner[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        read_trainer_state(checkpoint)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, words", [("[]", "it is not a JSON object"), ("{", "JSONDecodeError"), ("{}", "it has no 'config'")]
)
def test_no_state_at_all_is_told_too(checkpoint, text, words):
    (checkpoint / "state" / "trainer.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_trainer_state(checkpoint)
