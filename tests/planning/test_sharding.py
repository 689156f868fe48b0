"""What ZeRO's stages leave on a rank, and what DeepSpeed's own file says."""

import json
from types import SimpleNamespace

import pytest

from minillm.config.methods.miniplm_keys import MiniPLM
from minillm.config.methods.sft_keys import SFT
from minillm.config.models import TeacherConfig
from minillm.planning.sharding import Sharding, sharding_of
from minillm.planning.sizes import ModelSize


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "states"), [(1, 1, 1, 1 / 4), (2, 1, 1 / 4, 1 / 4), (3, 1 / 4, 1 / 4, 1 / 4)]
)
def test_stages_shard_more_and_more(stage, weights, gradients, states):
    factors = Sharding(world_size=4, stage=stage).factors()
    assert (factors["student weights"], factors["gradients"], factors["optimizer states"]) == (
        weights,
        gradients,
        states,
    )


def test_what_is_offloaded_is_in_the_host():
    sharding = Sharding(world_size=4, stage=3, offload_optimizer=True, offload_param=True, teacher="offloaded")
    for part in ("student weights", "teacher weights", "optimizer states", "fp32 master weights"):
        assert sharding.factors()[part] == 0 and sharding.host_factors()[part] == 1 / 4


def size(parameters: int, head: int = 0) -> ModelSize:
    """In bfloat16; the largest layer has 200 million weights."""
    sizes = {"layers": 32, "largest_layer": 200_000_000, "hidden_size": 1, "kv_bytes_per_token": 0}
    return ModelSize(parameters, 2, 2 * parameters, head, 0, **sizes, trained=parameters)


def test_gathered_layers_are_what_may_live_and_at_least_the_largest(tmp_path):
    sharding = Sharding(world_size=2, stage=3)
    assert sharding.layers(size(7_000_000_000)) == 2 * (1_000_000_000 + 50_000_000)
    assert sharding.layers(size(500_000_000)) == 2 * 500_000_000
    file = tmp_path / "ds.json"
    zero = {"stage3_max_live_parameters": 1e6, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": "auto"}
    file.write_text(json.dumps({"zero_optimization": zero}))
    engine = SimpleNamespace(
        type="deepspeed",
        stage=3,
        offload_optimizer=False,
        offload_param=True,
        gather="whole",
        replicate_teacher=False,
        config=str(file),
    )
    method = SFT(name="sft")
    read = sharding_of(SimpleNamespace(engine=engine, teacher_side=TeacherConfig(path="any"), method=method), 2)
    assert read.teacher == "offloaded" and read.layers(size(7_000_000_000)) == 400_000_000
    assert read.layers(size(7_000_000_000, head=300_000_000)) == 600_000_000
    assert read.buckets(7_000_000_000, 2) == 2_000_000_000  # sorted by ranks in a second one


def test_ranks_that_take_no_step_have_whole_models():
    engine = SimpleNamespace(type="deepspeed", stage=3)
    method = MiniPLM(name="miniplm", ratio=0.5, reference="any")
    config = SimpleNamespace(engine=engine, teacher_side=TeacherConfig(path="any"), method=method)
    read = sharding_of(config, 2)
    assert (read.world_size, read.stage) == (2, 0) and not read.gathers("student") and not read.gathers("teacher")


def test_what_is_whole_anyway_is_not_gathered():
    assert Sharding(world_size=2, stage=3, teacher="sharded").gathers("student")
    assert not Sharding(world_size=2, stage=2).gathers("student") and not Sharding(world_size=2, stage=2).gathers(
        "teacher"
    )
    assert not Sharding(world_size=1, stage=3).gathers("student")
    assert Sharding(world_size=1, stage=3, offload_param=True).gathers("student")
