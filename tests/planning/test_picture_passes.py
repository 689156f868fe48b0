"""Plans of models that see: weights and activations of the vision tower, and pictures counted in the data."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlavaConfig

from minillm import UserError
from minillm.config.loader.run_plan import load_run
from minillm.planning.architectures import Architectures
from minillm.planning.gpus import find_gpu
from minillm.planning.planner import plan_run
from minillm.planning.shown_pictures import largest_of_each_shape, pictures_found, shown_pictures
from minillm.planning.table import _notes
from tests.pictures import build_processor, picture, save_seeing
from tests.planning.small import SHAPE

SEEN = {"prompt": "what?", "completion": "this", "image": "nowhere.png"}  # which no plan opens
PAIR = {"prompt": "what?", "chosen": "this", "rejected": "that", "image": "nowhere.png"}


@pytest.fixture
def written(tmp_path):
    """A function that writes a run of one stage, of a student whose data are some records, and reads it."""

    def write(*records: dict, kind: str = "llava", student=(), size=(40, 30), **groups):
        (tmp_path / "seen.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        prompts = {"type": "jsonl", "path": str(tmp_path / "seen.jsonl"), "max_prompt_length": 40,
                   "max_response_length": 8}  # fmt: skip
        picture(0, *size).save(tmp_path / "there.png")
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
        return load_run([tmp_path / "recipe.yaml"])

    return write


@pytest.fixture
def planned(written):
    """A function that plans the stage."""

    def plan(*records: dict, **keys):
        (stage,) = plan_run(written(*records, **keys), gpu="cpu").stages
        return stage

    return plan


@pytest.fixture
def shown(written):
    """A function that finds the pictures which the plan of the stage shows, without one."""

    def find(*records: dict, **keys):
        plan = written(*records, **keys)
        (stage,), architectures = plan.stages, Architectures(plan)
        return shown_pictures(stage, architectures.student(stage), architectures)

    return find


def activations(stage, phase: str = "update") -> int:
    return stage.simulation.phases[phase].most("activations")


@pytest.mark.parametrize("kind", ["llava", "paligemma", "gemma3"])
def test_pictures_take_room_in_every_pass_and_flops(kind, planned):
    told = {key: value for key, value in SEEN.items() if key != "image"}
    rollout = {"buffer_size": 4, "batch_size": 4, "max_new_tokens": 8, "shared_coins": False}
    keys = {"kind": kind, "method": {"name": "minillm", "lm_coef": 0.0}, "rollout": rollout}
    without, one, three = (
        planned(*records, **keys) for records in ([told], [told, SEEN], [{**SEEN, "image": ["a"] * 3}])
    )
    assert without.simulation.shown is None and [stage.simulation.shown.count for stage in (one, three)] == [1, 3]
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
    assert shown.simulation.shown.count == 1
    assert activations(shown) > activations(without) + 2 * 4 * 3 * 28 * 28 * 4


def test_pictures_of_messages_are_counted(shown):
    source = {"type": "image", "image": "nowhere.png"}
    question = {"role": "user", "content": [source, {"type": "text", "text": "or"}, source]}
    record = {"messages": [question, {"role": "assistant", "content": "this"}]}
    assert shown(record).count == 2
    turns = {name: [question, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    assert shown(turns, method={"name": "dpkd", "pairs": "data", "lm_coef": 0.0}).count == 2


def test_pictures_that_do_not_fit_into_the_texts_are_named(planned):
    with pytest.raises(
        UserError,
        match=r"the pictures of a prompt .50. take 200 tokens, and it has 40 with its text: .* max_prompt_length",
    ):
        planned({**SEEN, "images": ["a"] * 49})


def test_a_set_that_is_not_here_shows_a_picture(shown):
    data = {"prompts": {"type": "hf", "path": "some/where", "max_prompt_length": 40, "max_response_length": 8}}
    assert shown(data=data).count == 1


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
        assert pictures_found(stage.config, LlavaConfig()).most == shown
        assert pictures_found(stage.config, LlamaConfig()).most == 0  # which reads text alone


CUT = ["idefics3", "llava_onevision", "qwen2_5_vl", "qwen2_vl"]  # architectures that cut pictures up by their sizes
THERE = {**SEEN, "image": "there.png"}


@pytest.mark.parametrize("kind", CUT)
def test_pictures_count_at_their_sizes(kind, planned):
    """A run has the shapes of its batches from the processor: what the plan says of a picture is what that makes of it."""
    keys = {"kind": kind, "method": {"name": "minillm", "lm_coef": 0.0},
            "rollout": {"buffer_size": 4, "batch_size": 4, "max_new_tokens": 8}}  # fmt: skip
    told = {key: value for key, value in SEEN.items() if key != "image"}
    # the longer side of either picture is two tiles, so that the square has more of them
    sizes = ((29, 29), (120, 60)) if kind.startswith("qwen") else ((120, 60), (60, 60))
    small, large = (planned(THERE, size=size, **keys) for size in sizes)
    without = planned(told, **keys)
    processor = build_processor(kind)
    for stage, size in zip((small, large), sizes, strict=True):
        shown = stage.simulation.shown
        made = processor(images=[[picture(0, *size)]], text=[processor.image_token], return_tensors="pt")
        assert shown.tokens == torch.isin(made["input_ids"], torch.tensor(processor.image_token_ids)).sum()
        assert shown.inputs.pixels == made["pixel_values"].numel()
        assert f"{size[0]} x {size[1]} pixels, the largest of the data" in shown.said
    assert small.simulation.shown.inputs.pixels < large.simulation.shown.inputs.pixels
    for phase in ("rollout", "scoring", "update"):
        held = [activations(stage, phase) for stage in (without, small, large)]
        assert held[0] < held[1] < held[2], phase
    flops = [stage.speed.update_flops for stage in (without, small, large)]
    assert flops[0] < flops[1] < flops[2]


@pytest.mark.parametrize("kind", CUT)
def test_pictures_that_are_not_here_are_as_large_as_prompts_have_room_for(kind, shown):
    assumed = shown(SEEN, kind=kind)
    assert "the square that takes most of what prompts have room for" in assumed.said
    assert assumed.tokens + 2 <= 40
    found = (shown(THERE, kind=kind, size=(side, side)) for side in (30, 60, 90))
    assert assumed.inputs.pixels >= max(one.inputs.pixels for one in found)


def test_a_picture_without_room_is_passed_over_as_a_run_drops_its_prompt(shown, tmp_path):
    data = {"prompts": {"type": "jsonl", "path": str(tmp_path / "seen.jsonl"), "max_prompt_length": 5}}
    picture(1, 200, 200).save(tmp_path / "large.png")
    found = shown(THERE, {**SEEN, "image": "large.png"}, kind="qwen2_vl", data=data, size=(58, 28))
    assert "58 x 28" in found.said and found.tokens == 2
    with pytest.raises(UserError, match="the pictures of a prompt .1. take 4 tokens, and it has 5 with its text"):
        shown({**SEEN, "image": "large.png"}, kind="qwen2_vl", data=data)


def test_of_pictures_of_one_shape_the_largest_stands_for_all():
    sizes = [(10, 10), (40, 41), (30, 30), (200, 50), (100, 25), (50, 200)]
    assert sorted(largest_of_each_shape(sizes)) == [(40, 41), (50, 200), (200, 50)]


def test_an_architecture_without_its_processor_says_what_is_missing(planned, tmp_path):
    folder = save_seeing("qwen2_vl", tmp_path / "qwen2_vl")
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    stage = planned(THERE, kind="qwen2_vl")
    assert stage.simulation.shown is None
    (said,) = stage.not_counted
    assert said.startswith("the passes over the prompts' pictures: ") and "no image processor is there" in said
    assert not planned({"prompt": "a", "completion": "b"}, kind="qwen2_vl").not_counted


def test_a_hub_name_has_its_processor_beside_its_architecture(planned, tmp_path):
    folder = save_seeing("qwen2_vl", tmp_path / "elsewhere")
    (tmp_path / "architectures").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "architectures" / "some--name.json")
    keys = {"kind": "qwen2_vl", "student": {"path": "some/name"}, "teacher": {"path": "some/name"}}
    (said,) = planned(THERE, **keys).not_counted
    assert (
        "put its preprocessor_config.json as some--name.preprocessor_config.json into a folder `architectures`" in said
    )
    build_processor("qwen2_vl").image_processor.save_pretrained(tmp_path / "elsewhere")
    file = tmp_path / "architectures" / "some--name.preprocessor_config.json"
    shutil.copy(tmp_path / "elsewhere" / "preprocessor_config.json", file)
    stage = planned(THERE, **keys)
    assert not stage.not_counted and "40 x 30 pixels" in stage.simulation.shown.said


def test_the_table_says_which_picture_was_assumed(planned):
    (line,) = [str(one) for one in _notes(planned(THERE, kind="idefics3"), find_gpu("cpu")) if "pictures: " in str(one)]
    assert (
        line
        == "pictures: 1 in a prompt, of 5 tokens each: 40 x 30 pixels, the largest of the data that prompts have room for"
    )
