"""Plans of models that see: weights and activations of the vision tower, and pictures counted in the data."""

import json

import pytest
import yaml
from transformers import LlamaConfig, LlavaConfig

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.planning.picture_passes import OF_ONE_SIZE, pictures_shown
from minillm.planning.planner import plan_run
from tests.pictures import KINDS, save_seeing
from tests.planning.small import SHAPE

SEEN = {"prompt": "what?", "completion": "this", "image": "nowhere.png"}  # which no plan opens
PAIR = {"prompt": "what?", "chosen": "this", "rejected": "that", "image": "nowhere.png"}


@pytest.fixture
def planned(tmp_path):
    """A function that plans a stage of a student whose data are some records."""

    def plan(*records: dict, kind: str = "llava", student=(), **groups):
        (tmp_path / "seen.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        prompts = {"type": "jsonl", "path": str(tmp_path / "seen.jsonl"), "max_prompt_length": 40,
                   "max_response_length": 8}  # fmt: skip
        folder = tmp_path / kind
        document = {
            "output_dir": str(tmp_path / "run"),
            "student": {"path": str(folder if folder.is_dir() else save_seeing(kind, folder)), **dict(student)},
            "teacher": {"path": str(folder)},
            "data": {"prompts": prompts, "pairs": prompts},
            "method": {"name": "kd"},
            "train": {"max_steps": 1, "per_device_train_batch_size": 4},
            **groups,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
        (stage,) = plan_run(load_run([tmp_path / "recipe.yaml"]), gpu="cpu").stages
        return stage

    return plan


def activations(stage, phase: str = "update") -> int:
    return stage.simulation.phases[phase].most("activations")


@pytest.mark.parametrize("kind", sorted(OF_ONE_SIZE))
def test_pictures_take_room_in_every_pass_and_flops(kind, planned):
    told = {key: value for key, value in SEEN.items() if key != "image"}
    rollout = {"buffer_size": 4, "batch_size": 4, "max_new_tokens": 8, "shared_coins": False}
    keys = {"kind": kind, "method": {"name": "minillm", "lm_coef": 0.0}, "rollout": rollout}
    without, one, three = (
        planned(*records, **keys) for records in ([told], [told, SEEN], [{**SEEN, "image": ["a"] * 3}])
    )
    assert [stage.simulation.pictures for stage in (without, one, three)] == [0, 1, 3]
    pixels = 4 * 3 * 28 * 28 * 4  # of a batch of pictures, which a pass holds at least, in fp32
    for phase in ("rollout", "scoring", "update"):
        held = [activations(stage, phase) for stage in (without, one, three)]
        assert held[1] >= held[0] + pixels * (phase != "rollout") and held[2] >= held[1] + pixels, phase
    flops = [stage.speed.update_flops for stage in (without, one, three)]
    assert flops[1] > flops[0] and flops[2] - flops[1] == pytest.approx(2 * (flops[1] - flops[0]))
    assert not one.not_counted


def test_a_tower_that_is_frozen_keeps_no_activations(planned):
    trained, above, frozen = (
        planned(SEEN, student={"train": parts})
        for parts in (["vision", "language"], ["projector", "language"], ["language"])
    )
    state = 4 * (1 + 2 * 2) * 16 * 4  # of one layer of the tower: pictures, a class and patches, width, fp32
    assert activations(trained) > activations(above) + 8 * state
    assert activations(above) > activations(frozen)
    assert trained.speed.update_flops > above.speed.update_flops == frozen.speed.update_flops


def test_pairs_show_a_picture_beside_each_answer(planned):
    keys = {"method": {"name": "dpkd", "pairs": "data", "lm_coef": 0.0}}
    told = {key: value for key, value in PAIR.items() if key != "image"}
    without, shown = planned(told, **keys), planned(PAIR, **keys)
    assert shown.simulation.pictures == 1
    assert activations(shown) > activations(without) + 2 * 4 * 3 * 28 * 28 * 4


def test_pictures_of_messages_are_counted(planned):
    source = {"type": "image", "image": "nowhere.png"}
    question = {"role": "user", "content": [source, {"type": "text", "text": "or"}, source]}
    record = {"messages": [question, {"role": "assistant", "content": "this"}]}
    assert planned(record).simulation.pictures == 2
    turns = {name: [question, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    assert planned(turns, method={"name": "dpkd", "pairs": "data", "lm_coef": 0.0}).simulation.pictures == 2


def test_pictures_that_do_not_fit_into_the_texts_are_named(planned):
    with pytest.raises(
        UserError, match=r"the pictures of a batch take 800 tokens, and all of its texts have 188: .* max_prompt_length"
    ):
        planned({**SEEN, "images": ["a"] * 49})


def test_a_set_that_is_not_here_shows_a_picture(planned):
    data = {"prompts": {"type": "hf", "path": "some/where", "max_prompt_length": 40, "max_response_length": 8}}
    assert planned(data=data).simulation.pictures == 1


def test_questions_about_shapes_show_a_picture_each(tmp_path):
    shapes = {"type": "easy_vqa", "max_prompt_length": 40, "max_response_length": 8}
    sums = {"type": "arithmetic", "max_prompt_length": 40, "max_response_length": 8}
    document = {
        "output_dir": str(tmp_path / "run"),
        "student": {"init": "random", "tokenizer": "byte", "config": SHAPE},
        "data": {"prompts": shapes},
        "method": {"name": "sft"},
        "train": {"max_steps": 1},
    }
    for prompts, shown in ((shapes, 1), (sums, 0)):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**document, "data": {"prompts": prompts}}))
        (stage,) = load_run([tmp_path / "run.yaml"]).stages
        assert pictures_shown(stage.config, LlavaConfig()) == shown
        assert pictures_shown(stage.config, LlamaConfig()) == 0  # which reads text alone


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - OF_ONE_SIZE))
def test_pictures_whose_sizes_are_not_known_are_said_to_be_missing(kind, planned):
    stage = planned(SEEN, kind=kind)
    assert stage.simulation.pictures == 0
    (said,) = stage.not_counted
    assert said.startswith("the passes over the prompts' pictures")
    assert not planned({"prompt": "a", "completion": "b"}, kind=kind).not_counted
