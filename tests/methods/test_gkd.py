"""Generalised knowledge distillation: whose answers a step trains on, how they are sampled, and its divergence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minillm.methods import build_method
from minillm.rollout.noise import AGAIN
from minillm.rollout.rollouts import Sampling
from tests.methods.conftest import SHOWN

SETTINGS = {"temperature": 0.5, "top_k": 4, "top_p": 0.75}


def test_answers_are_the_students_sampled_as_configured_and_keyed_by_step(asked):
    one = asked(name="gkd", on_policy=1.0, rollout=SETTINGS)
    items = build_method(one.config).collect(one.data, None, draw=3)
    (call,) = one.calls
    numbers = [prompt[0] - 20 for prompt in call["prompts"]]  # Example 40 + i begins with token 60 + i
    assert call["sampling"] == Sampling(9, 0.5, 4, 0.75)
    assert (call["seed"], call["draw"], call["batch_size"]) == (7, 3, 2)
    assert call.get("who", "student") == "student" and call["extras"] == [SHOWN] * 5
    assert sorted(call["keys"]) == sorted({*numbers} | {AGAIN + n for n in numbers if numbers.count(n) == 2})
    assert [(item.prompt, item.response, item.key) for item in items] == [
        (prompt, [key % 200, 256], number)
        for prompt, key, number in zip(call["prompts"], call["keys"], numbers, strict=True)
    ]
    assert all(item.extras["pixel_values"] is SHOWN["pixel_values"] for item in items)
    assert one.told == [("sampling answers", done, 5) for done in (1, 2, 3, 4, 5)]
    assert "time/rollout_s" in one.data.timing.read()


def test_the_coin_of_a_step_is_keyed_by_seed_and_draw(asked):
    one = asked(name="gkd", on_policy=0.5)
    method = build_method(one.config)
    tossed = []
    for draw in range(20):
        before = len(one.calls)
        method.collect(one.data, None, draw)
        tossed.append(len(one.calls) > before)
    assert tossed == [np.random.default_rng([7, draw]).random() < 0.5 for draw in range(20)]


@pytest.mark.parametrize(
    "beta, divergence, options", [(0.0, "forward_kl", {}), (1.0, "reverse_kl", {}), (0.25, "jsd", {"beta": 0.25})]
)
def test_the_end_points_of_beta_are_the_two_kls(beta, divergence, options, asked, make_models):
    one = asked(name="gkd", beta=beta, on_policy=0.0)
    method, models = build_method(one.config), make_models()
    items = [replace(item, extras={}) for item in method.collect(one.data, models, 0)]
    (term,) = method.terms(items, one.data, models)
    assert term.fields == (divergence,) and term.options == options
    stats = type("Stats", (), {divergence: torch.tensor([0.5])})
    assert term.objective(stats)[0].item() == 0.5
