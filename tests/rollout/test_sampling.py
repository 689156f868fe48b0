"""Sampled answers against full forward passes, transformers' generate, and one another in other batches."""

import pytest
import torch

from minillm.models.pair import Models
from minillm.rollout.sampling import Answer, Sampling, sample

ARCHITECTURES = ("llama", "gpt2", "opt", "qwen2", "gemma2", "cohere")


def run(models: Models, prompts, sampling: Sampling, **options) -> list[Answer]:
    options = {"keys": range(len(prompts)), "seed": 5, "batch_size": len(prompts), **options}
    return sample(models, prompts, sampling, **options)


def ids(answers: list[Answer]) -> list[list[int]]:
    return [answer.response for answer in answers]


@pytest.mark.parametrize("who", ["student", "teacher", "mixture"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_those_of_a_full_forward(make_models, prompts, eager_logprobs, architecture, who):
    models = make_models(architecture)
    sampling = Sampling(20, alpha=0.3 if who == "mixture" else 0.0)
    answers = run(models, prompts, sampling, who=who, batch_size=4)
    assert [answer.prompt for answer in answers] == prompts
    assert len({len(answer.response) for answer in answers}) > 1, "some rows must end before others"
    for answer in answers:
        full = {role: eager_logprobs(models, answer.prompt, answer.response, role) for role in ("student", "teacher")}
        alpha = {"student": 0.0, "teacher": 1.0, "mixture": 0.3}[who]
        mixed = (alpha * full["teacher"].exp() + (1 - alpha) * full["student"].exp()).log()
        expected = mixed.gather(-1, torch.tensor(answer.response)[:, None])[:, 0]
        torch.testing.assert_close(answer.logprobs.double(), expected, atol=1e-4, rtol=0)
