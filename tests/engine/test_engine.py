"""Which engine a configuration gets, with what it is given, and how an engine names numbers that are not finite."""

import pytest

from minillm.config.root import StageConfig
from minillm.engine import build_engine
from minillm.engine import deepspeed as deepspeed_engine
from minillm.engine import engine as protocol


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_the_named_engine_gets_all_that_is_trained(kind, monkeypatch):
    made = {}

    def remember(name):
        return lambda *arguments, **options: made.update({name: (arguments, options)})

    monkeypatch.setattr("minillm.engine.TorchEngine", remember("torch"))
    monkeypatch.setattr(deepspeed_engine, "DeepSpeedEngine", remember("deepspeed"))
    config = StageConfig(
        output_dir="unused", student={"path": "unused"}, method={"name": "sft"}, train={"max_steps": 1}, engine={"type": kind}
    )  # fmt: skip
    options = {"total_steps": 9, "modules": {"projector": None}, "learning_rates": {"projector": 0.5}}
    build_engine(config, "models", **options)
    assert made == {kind: (("models", config.train, config.engine), options)}


def test_numbers_that_are_not_finite_are_named():
    assert str(protocol.NonFiniteError.of({"loss": float("nan"), "grad_norm": 2.0})) == "loss nan, grad_norm 2.0"
