"""A quantised teacher in a plan: what is kept of its layers, what a pass allocates, and that it stays whole."""

import importlib.util

import pytest

from minillm.planning.quantized_layers import BLOCK, BLOCK_OF_SCALES
from tests.planning.small import MATRICES, planned

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("bitsandbytes", "deepspeed")),
    reason="bitsandbytes or deepspeed is not installed",
)
PLAIN = 4 * 2 * 64 + 64 + 2 * 640 * 64  # norms, embeddings and head
KEPT = {  # of four layers
    "int8": 4 * (MATRICES + 4 * (64 + 32 + 32 + 64 + 128 + 128 + 64)),  # an fp32 scale a row
    "nf4": 4 * (MATRICES // 2 + MATRICES // BLOCK + 4 * MATRICES // BLOCK // BLOCK_OF_SCALES),
}


@pytest.mark.parametrize("kind", KEPT)
def test_its_layers_are_packed_and_the_rest_is_plain(recipe, kind):
    whole, stage = planned(recipe()), planned(recipe(), f"teacher.quantization={kind}")
    sizes = whole.simulation.teacher, stage.simulation.teacher
    assert sizes[0].parameters == sizes[1].parameters and sizes[0].stored_bytes == 2 * sizes[0].parameters
    weights = stage.simulation.phases["rollout"].most("teacher weights")
    assert abs(weights - 2 * PLAIN - KEPT[kind]) < 1024  # and the table of rotary frequencies
    assert stage.simulation.teacher.kv_bytes_per_token == whole.simulation.teacher.kv_bytes_per_token


def test_it_is_whole_on_every_rank_as_one_that_is_replicated(recipe):
    sharded = ("engine.type=deepspeed", "train.bf16=true")
    sizes = {}
    for key in ("engine.replicate_teacher=false", "engine.replicate_teacher=true", "teacher.quantization=nf4"):
        stage = planned(recipe(), *sharded, key, gpu="A100-80GB", world_size=2)
        rollout = next(phase for phase in stage.memory if phase.phase == "rollout").device
        sizes[key] = stage.sharding.teacher, rollout["teacher weights"], rollout["gathered weights"]
    whole, student = 2 * stage.simulation.teacher.parameters, 2 * stage.simulation.student.parameters
    kinds, weights, gathered = zip(*sizes.values(), strict=True)
    assert kinds == ("sharded", "replicated", "replicated") and gathered == (student + whole, student, student)
    assert [abs(held - whole // part) < 1024 for held, part in zip(weights[:2], (2, 1), strict=True)] == [True, True]
    assert weights[2] < 0.6 * whole
