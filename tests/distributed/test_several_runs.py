"""Stages and runs of DeepSpeed one after the other in one process: each gives back its memory before the next begins.

Run as a program it is that process: RECIPE FOLDER...
"""

import gc
import importlib.util
import sys

import pytest
import torch
import yaml

from minillm.cli.main import main
from minillm.train.stage import StageBuilder


def live_bytes() -> int:
    """Memory of all tensors that Python knows."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def one_process(recipe: str, *folders: str) -> None:
    make_trainer = StageBuilder.trainer

    def tell(builder, stage, *args, **options):
        print("live", live_bytes(), flush=True)
        return make_trainer(builder, stage, *args, **options)

    StageBuilder.trainer = tell
    for folder in folders:
        assert main(["train", recipe, f"output_dir={folder}"]) == 0
        print("live", live_bytes(), flush=True)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("engine", [{"stage": 3}, {"stage": 2, "offload_optimizer": True}], ids=["stage-3", "stage-2"])
def test_stages_and_runs_give_back_their_memory(tmp_path, small_run, start, finish, engine):
    document = small_run(tmp_path, layers=2)
    document["engine"] = {"type": "deepspeed", **engine}
    document["train"] |= {"gradient_accumulation_steps": 1, "max_steps": 2}
    document["eval"] = {"sets": {}}
    taught = {"teacher": {"path": "stage:teacher"}, "method": {"name": "kd"}}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 512}}},  # more than a megabyte per weight
        "one": taught,
        "two": taught,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    (output,) = finish(start(1, __file__, str(recipe), str(tmp_path / "first"), str(tmp_path / "second")))
    live = [int(line.split()[1]) for line in output.splitlines() if line.startswith("live ")]
    assert len(live) == 8
    teacher = max(live)  # before the last stage of each run the teacher alone is there
    assert teacher > 2**22
    assert [place for place, size in enumerate(live) if size > teacher / 4] == [2, 6]


if __name__ == "__main__":
    one_process(*sys.argv[1:])
