"""The common part of the methods on sampled answers: asking for the answers, and the clipped policy gradient."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minillm import UserError
from minillm.config.root import StageConfig
from minillm.data.pairs import AnswerPair
from minillm.methods.protocol import TrainingData
from minillm.models.batch import TokenSequence
from minillm.rollout.noise import distinct_keys
from minillm.rollout.rollouts import Answer, Sampling, Who


def sample_answers(
    prompts: Sequence[TokenSequence],
    data: TrainingData,
    config: StageConfig,
    *,
    draw: int,
    alpha: float = 0.0,
    who: Who = "student",
) -> list[Answer]:
    """One answer to each prompt, in their order, sampled as `rollout` says; a prompt that comes twice is answered anew.

    Args:
        draw: what `collect` was given: with the seed and the prompt it decides the answer, so that a resumed run samples
            the same ones.
        alpha: the teacher's weight, where `who` is the mixture.
        who: the teacher answers its own prompts, where it has any.

    Raises UserError for a mixture where the teacher has prompts of its own.
    """
    if who == "mixture" and any(prompt.teacher_prompt is not None for prompt in prompts):
        raise UserError(
            "a mixture of teacher and student reads one text, and these prompts have a context for the teacher"
        )
    rollout = config.rollout
    asked = [prompt.read_by_teacher() for prompt in prompts] if who == "teacher" else prompts
    with data.timing.of("rollout"):
        answers = data.rollouts.sample(
            [prompt.prompt for prompt in asked],
            Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p, alpha),
            keys=distinct_keys([prompt.key for prompt in prompts]),
            extras=[prompt.extras for prompt in prompts],
            seed=config.seed,
            draw=draw,
            who=who,
            batch_size=rollout.batch_size,
            progress=lambda done: data.report_progress("sampling answers", done, len(prompts)),
        )
    return [
        replace(answer, prompt=prompt.prompt, teacher_prompt=prompt.teacher_prompt)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def answered(prompts: Sequence[TokenSequence], answers: Sequence[Answer]) -> list[TokenSequence]:
    """The prompts with these answers as the response to be trained on."""
    return [
        TokenSequence(
            answer.prompt,
            answer.response,
            prompt.key,
            answer.extras,
            teacher_prompt=answer.teacher_prompt,
            judge=prompt.judge,
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def sampled_pairs(
    prompts: Sequence[TokenSequence], data: TrainingData, config: StageConfig, *, draw: int
) -> list[AnswerPair]:
    """An answer of the teacher, which is preferred, and one of the student to each prompt."""
    # noise of their own: with the same, two models that are near each other would give the same answer
    chosen = answered(prompts, sample_answers(prompts, data, config, draw=2 * draw, who="teacher"))
    rejected = answered(prompts, sample_answers(prompts, data, config, draw=2 * draw + 1, who="student"))
    return [AnswerPair(one.key, one, other) for one, other in zip(chosen, rejected, strict=True)]


def clipped_policy_loss(
    ratio: Tensor,  # (C,) of the student to the one that sampled; carries the gradient
    advantage: Tensor,  # (C,)
    cliprange: float | None,
) -> tuple[Tensor, Tensor]:  # (C,) each
    """PPO's loss of a token (arXiv 1707.06347, equation 7), and which tokens it gives no gradient.

    max(-ratio A, -clip(ratio, 1 - cliprange, 1 + cliprange) A); without a clip range -ratio A, of which no token is silent.
    """
    loss = -advantage * ratio
    if cliprange is None:
        return loss, torch.zeros_like(ratio, dtype=torch.bool)
    clipped = -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(loss, clipped), clipped > loss
