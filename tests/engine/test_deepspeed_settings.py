"""What DeepSpeed is told: a user's file, with minillm's decisions put over it."""

import json

from minillm.config.training import DeepSpeedEngine as DeepSpeedConfig
from minillm.config.training import TrainConfig
from minillm.engine.deepspeed import engine_settings

TRAIN = {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}


def settings(train=None, **engine):
    train, engine = TrainConfig(**TRAIN, **(train or {})), DeepSpeedConfig(type="deepspeed", **engine)
    return engine_settings(train, engine, world_size=2, trained=1000)


def test_minillm_accumulates_by_itself():
    found = settings()
    assert found["train_micro_batch_size_per_gpu"] == 3 and found["gradient_accumulation_steps"] == 1
    assert found["train_batch_size"] == 6


def test_clipping_and_precision_are_those_of_train():
    assert settings({"max_grad_norm": 0.25})["gradient_clipping"] == 0.25
    assert settings({"max_grad_norm": None})["gradient_clipping"] == 0.0
    assert settings({"bf16": True})["bf16"] == {"enabled": True} and "bf16" not in settings()


def test_what_is_offloaded():
    zero = settings(stage=3, offload_optimizer=True, offload_param=True)["zero_optimization"]
    to_cpu = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert zero == {"stage": 3, "reduce_bucket_size": 1000, **to_cpu}
    assert settings(stage=2)["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}


def test_what_the_file_says_of_what_is_offloaded_stays(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}))
    zero = settings(config=str(file), offload_optimizer=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_the_bucket_of_gradients_is_no_larger_than_the_student(tmp_path):
    assert settings()["zero_optimization"]["reduce_bucket_size"] == 1000
    for asked, expected in (("auto", 1000), (5e8, 1000), (100, 100)):
        file = tmp_path / "ds.json"
        file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": asked}}))
        assert settings(config=str(file))["zero_optimization"]["reduce_bucket_size"] == expected


def test_a_users_file_keeps_what_minillm_does_not_decide(tmp_path):
    file = tmp_path / "ds.json"
    given = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "steps_per_print": 10, "bf16": {"x": 1}}
    file.write_text(json.dumps(given))
    found = settings({"bf16": True}, stage=3, config=str(file))
    assert found["zero_optimization"] == {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 1000}
    assert found["steps_per_print"] == 10
    assert found["bf16"] == {"x": 1, "enabled": True}
