"""The update of a model whose layers are alike, planned from a few of them: the moments that all of them have."""

import pytest

from minillm.planning import few_layers, simulate
from tests.planning.small import SHAPE, SHARDED, planned

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 5, "n_head": 4, "vocab_size": 512, "n_positions": 64}
# activations fall and gradients rise on the way back: by these the worst moment is in the last layer, the first, or both
WEIGHTS = ({}, {"gradients": 0.01}, {"gradients": 20.0}, {"activations": 0.0}, {"gathered weights": 3.0})


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ({}, ()),
        ({}, ("train.gradient_checkpointing=true",)),
        ({}, ("train.bf16=true", "train.gradient_accumulation_steps=2")),
        ({}, ("train.bf16=true", "train.gradient_checkpointing=true")),
        ({}, (*SHARDED, "train.gradient_checkpointing=true")),
        ({}, ("student.lora={r: 4, alpha: 8}", "student.dtype=bfloat16", "train.gradient_checkpointing=true")),
        (GPT2, ("train.bf16=true",)),
    ],
)
def test_a_few_layers_have_the_worst_moments_of_all(config, keys, recipe, monkeypatch):
    config = config or {**SHAPE, "num_hidden_layers": 5}
    path = recipe(
        student={"init": "random", "tokenizer": "byte", "config": config},
        method={"name": "sft"},
        teacher=None,
    )
    few = planned(path, *keys).simulation.phases["update"]
    monkeypatch.setattr(simulate, "_DONE", {})
    run = []
    monkeypatch.setattr(few_layers, "left_out_of", lambda model, layers: run.append(len(layers)) or 0)
    every = planned(path, *keys).simulation.phases["update"]
    assert run == [5] and len(few.moments) < len(every.moments)
    for weights in WEIGHTS:
        worst = [sum(one.peak(weights, {}).values()) for one in (few, every)]
        assert worst[0] == worst[1], weights
    for part in ("activations", "gradients", "loss buffers", "student weights"):
        assert few.most(part) == every.most(part), part
