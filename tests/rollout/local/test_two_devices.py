"""Answers of models on two devices are those of one: rows that are used anew, prompts that are read once, and a teacher that
answers alone where it is."""

import pytest
import torch

from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from tests.pretended_devices import pretended_devices

HERE, THERE = torch.device("cpu"), torch.device("xpu:1")
PROMPTS = [[10 + one, 20, 30][: 1 + one % 3] for one in (0, 0, 1, 2, 2, 2, 5, 8)]


def answers(models, who: str, **options) -> tuple[list[tuple], torch.Tensor]:
    sampling = Sampling(7, alpha=0.4 if who == "mixture" else 0.0)
    rollouts = LocalRollouts(models, **options)
    drawn = rollouts.sample(PROMPTS, sampling, keys=range(len(PROMPTS)), seed=3, who=who, batch_size=4)
    return [(one.response, one.ended) for one in drawn], torch.cat([one.logprobs for one in drawn])


@pytest.mark.parametrize("who", ["student", "teacher", "mixture"])
@pytest.mark.parametrize(
    "options", [{}, {"share_prompts": True}, {"refill": False}, {"shared_coins": True}], ids=lambda one: "".join(one)
)
def test_answers_are_those_of_one_device(make_models, who, options):
    expected, logprobs = answers(make_models(), who, **options)
    with pretended_devices():
        models = make_models()
        models.teacher.model.to(THERE)
        models.teacher.give_to(HERE)
        found, theirs = answers(models, who, **options)
    assert found == expected
    torch.testing.assert_close(theirs, logprobs, rtol=0, atol=1e-5)


def test_a_teacher_answers_alone_where_it_is(make_models):
    with pretended_devices():
        models = make_models()
        models.teacher.model.to(THERE)
        assert models.elsewhere("teacher") == THERE and models.elsewhere("student") is None
        assert models.sampling("teacher").device == models.teacher_alone().device == THERE
        assert models.sampling("teacher").elsewhere("teacher") is None
        assert models.sampling("student", "teacher") is models.sampling("student") is models
        alone = models.teacher_alone()
        assert alone.student is models.teacher.model and alone.teacher is None


def test_the_template_of_a_delta_is_not_where_the_delta_is(make_models):
    with pretended_devices():
        models = make_models()
        models.teacher.model.to(THERE)
        judged = models.controlled()
        assert judged.device == HERE and judged.elsewhere("student") == THERE
        assert judged.head("student").weight.device == HERE == judged.delta.head().weight.device
