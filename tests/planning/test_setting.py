"""What of a configuration changes the simulated shapes: dtypes and who keeps fp32 weights, by engine."""

import pytest

from minillm.config.loader.run_plan import load_run
from minillm.planning.setting import Setting


@pytest.mark.parametrize(
    ("keys", "student_dtype", "autocast", "master_weights"),
    [
        ((), "float32", False, False),
        (("train.bf16=true",), "float32", True, False),  # torch casts each use of a weight
        (("engine.type=deepspeed",), "float32", False, True),
        (("engine.type=deepspeed", "train.bf16=true"), "bfloat16", False, True),  # DeepSpeed casts the weights
    ],
)
def test_bf16_is_of_uses_or_of_weights(recipe, keys, student_dtype, autocast, master_weights):
    (stage,) = load_run([recipe()], keys).stages
    found = Setting.of(stage.config, checkpointing=False)
    assert (found.student_dtype, found.autocast) == (student_dtype, autocast)
    assert found.master_weights == found.gradients_stay == master_weights
    assert found.teacher_dtype == "bfloat16" and not found.checkpointing
