"""The parts that methods on sampled answers share: what a sampler is asked for, and the clip with its gradient."""

from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.methods.on_policy import clipped_policy_loss, sample_answers, sampled_pairs
from minillm.rollout.noise import distinct_keys
from minillm.rollout.rollouts import Sampling
from tests.methods.conftest import SHOWN


@pytest.mark.parametrize("who, alpha", [("student", 0.0), ("mixture", 0.3)])
def test_a_sampler_is_asked_for_what_rollout_says(who, alpha, asked):
    one = asked(name="gkd", rollout={"temperature": 0.7, "top_k": 5, "top_p": 0.9})
    prompts = [example.sequence for example in one.data.prompts.take(5)]
    answers = sample_answers(prompts, one.data, one.config, draw=3, alpha=alpha, who=who)
    (call,) = one.calls
    assert call["prompts"] == [prompt.prompt for prompt in prompts] == [answer.prompt for answer in answers]
    assert call["sampling"] == Sampling(9, 0.7, 5, 0.9, alpha) and call["who"] == who
    assert (call["seed"], call["draw"], call["batch_size"]) == (7, 3, 2) and call["extras"] == [SHOWN] * 5
    assert call["keys"] == distinct_keys([prompt.key for prompt in prompts]) and len(set(call["keys"])) == 5
    assert one.told == [("sampling answers", done, 5) for done in range(1, 6)]
    assert one.data.timing.read().keys() == {"time/rollout_s"}


def test_the_clip_silences_what_has_gone_far_enough_in_the_direction_of_its_advantage():
    # a ratio below, inside and above the range, each with an advantage of either sign
    ratio = torch.tensor([0.5, 1.1, 1.5] * 2, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    loss, silenced = clipped_policy_loss(ratio, advantage, 0.2)
    assert loss.tolist() == pytest.approx([-1.0, -2.2, -2.4, 1.6, 2.2, 3.0])
    assert silenced.tolist() == [False, False, True, True, False, False]
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    assert gradient.tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]


def test_without_a_range_nothing_is_silenced():
    ratio = torch.tensor([0.01, 9.0], dtype=torch.float64)
    loss, silenced = clipped_policy_loss(ratio, torch.tensor([-1.0, 1.0], dtype=torch.float64), None)
    assert loss.tolist() == [0.01, -9.0] and not silenced.any()


def test_each_model_answers_the_prompt_that_it_reads(asked):
    one = asked(name="distillm2")
    prompts = [
        replace(example.sequence, teacher_prompt=[3, *example.prompt_ids]) for example in one.data.prompts.take(3)
    ]
    for pair, prompt in zip(sampled_pairs(prompts, one.data, one.config, draw=0), prompts, strict=True):
        for answer in (pair.chosen, pair.rejected):
            assert (answer.prompt, answer.teacher_prompt) == (prompt.prompt, prompt.teacher_prompt)
    by_teacher, by_student = one.calls
    assert (by_teacher["who"], by_student["who"]) == ("teacher", "student")
    assert by_teacher["prompts"] == [prompt.teacher_prompt for prompt in prompts]
    assert by_student["prompts"] == [prompt.prompt for prompt in prompts]
    with pytest.raises(UserError, match="a mixture of teacher and student reads one text"):
        sample_answers(prompts, one.data, one.config, draw=0, alpha=0.2, who="mixture")
