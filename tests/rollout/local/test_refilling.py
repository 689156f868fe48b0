"""Rows of answers that have ended take the prompts that wait: the same answers as in batches one after the other."""

from dataclasses import replace

import pytest
import torch

from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local import decoding_check, growing_loop, local_rollouts
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.decoding_check import refilling_error, replaces_rows
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Answer, Sampling
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from tests.sweep.tiny_models import tiny_architecture, tiny_model

VOCABULARY = 264
SOME_ENDS = tuple(range(0, VOCABULARY, 16))
LENGTHS = (3, 11, 1, 7, 7, 2, 5, 6, 12, 4, 9, 1, 3, 8, 10, 2, 5)


@pytest.fixture
def many_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 61, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def pair_of():
    """A student and a teacher of a kind, in float64, with windows of a few tokens where they have any."""

    def make(kind: str) -> Models:
        architecture = tiny_architecture(kind)
        for config in {id(one): one for one in (architecture, architecture.get_text_config())}.values():
            if getattr(config, "sliding_window", None) is not None:
                config.sliding_window = 6
        student, teacher = (tiny_model(architecture).double() for _ in range(2))
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.1)
        teacher = LocalTeacher(teacher.requires_grad_(False))
        return Models(student, teacher, byte_tokenizer(), VOCABULARY, SOME_ENDS, 0, torch.device("cpu"))

    return make


def sample(models: Models, prompts, sampling: Sampling, *, size: int = 4, who: str = "mixture", **options):
    options = {"keys": range(len(prompts)), "seed": 5, "batch_size": size, **options}
    return LocalRollouts(models).sample(prompts, sampling, who=who, **options)


def in_batches(monkeypatch, *arguments, **options) -> list[Answer]:
    with monkeypatch.context() as patch:
        patch.setattr(LocalRollouts, "_refills", lambda *_: False)
        return sample(*arguments, **options)


@pytest.fixture
def refilled(monkeypatch) -> list[int]:
    """Numbers of prompts that were read into a running batch."""
    counts, refill = [], Decoder.refill
    monkeypatch.setattr(
        Decoder, "refill", lambda self, rows, *rest: counts.append(len(rows)) or refill(self, rows, *rest)
    )
    return counts


def assert_same(ours: list[Answer], theirs: list[Answer]) -> None:
    for got, expected in zip(ours, theirs, strict=True):
        assert (got.prompt, got.response, got.ended) == (expected.prompt, expected.response, expected.ended)
        torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-6, rtol=0)


# rotary and learned positions, normed heads, windows (with layers that see everything between them, or chunks), ALiBi,
# a convolution and states that recur, alone and beside attention
KINDS = ["llama", "gpt2", "opt", "qwen3", "gemma2", "gemma3_text", "mistral", "llama4_text", "bloom", "mamba2", "bamba", "lfm2", "qwen3_next", "falcon_h1"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_of_batches_one_after_the_other(pair_of, many_prompts, monkeypatch, refilled, kind):
    models, sampling = pair_of(kind), Sampling(24, alpha=0.3)
    expected = in_batches(monkeypatch, models, many_prompts, sampling)
    assert len({len(answer.response) for answer in expected}) > 5, "rows must end at different tokens"
    got = sample(models, many_prompts, sampling)
    assert_same(got, expected)
    assert sum(refilled) >= 2 * 8
