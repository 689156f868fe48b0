"""A plan of a student of images and text whose parts do not all train."""

import pytest
import yaml

from minillm.config.loader.run_plan import load_run
from minillm.models.parts import train_parts, weights_of
from minillm.planning.planner import plan_run
from tests.pictures import build_processor, build_seeing, save_seeing


@pytest.fixture
def planned(tmp_path):
    """A function that plans a student of llava's shape, whose keys it takes."""
    (tmp_path / "seen.jsonl").write_text("")
    document = {
        "output_dir": str(tmp_path / "run"),
        "student": {"path": str(save_seeing("llava", tmp_path / "student"))},
        "data": {"prompts": {"type": "jsonl", "path": str(tmp_path / "seen.jsonl")}},
        "method": {"name": "sft"},
        "train": {"max_steps": 1, "per_device_train_batch_size": 2},
    }

    def plan(**student):
        document["student"] |= student
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
        (stage,) = plan_run(load_run([tmp_path / "recipe.yaml"]), gpu="cpu").stages
        return stage

    return plan


def test_optimizer_and_gradients_are_those_of_the_parts_that_train(planned):
    model = build_seeing("llava", build_processor("llava"))
    weights = {part: sum(one.numel() for one in of_part) for part, of_part in weights_of(model).items()}
    whole, flops = planned(), []
    for student in ({"train": ["language"]}, {"train": ["projector"]}, {"train": ["vision"], "vision_from_layer": 1}):
        train_parts(model, student["train"], vision_from_layer=student.get("vision_from_layer"))
        trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
        stage = planned(**student)
        update = stage.simulation.phases["update"]
        assert update.most("optimizer states") == 8 * trained and update.most("gradients") == 4 * trained
        assert (
            stage.simulation.student.trained == trained < stage.simulation.student.parameters == sum(weights.values())
        )
        flops.append(stage.speed.update_flops)
    # where the language model is frozen its weights have no gradient; what reads pictures is not counted
    assert flops[0] == whole.speed.update_flops and flops[1] == flops[2] < 0.8 * flops[0]
