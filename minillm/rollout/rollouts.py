"""The protocol of what samples: answers to prompts, from the student, the teacher or their mixture.

The decode loops of minillm.rollout.local are one implementation. A method is handed one and never asks which.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from minillm import UserError

Who = Literal["student", "teacher", "mixture"]
ProgressCallback = Callable[[str, int, int], None]  # (what is being done, how many are, of how many)


@dataclass(frozen=True)
class Sampling:
    """The way tokens are drawn. The defaults are neutral: the model's own distribution.

    temperature 0 takes the likeliest token. top_k 0 and top_p 1 ban nothing. alpha is the teacher's weight in a mixture.
    no_repeat_ngram_size bans tokens that would repeat an n-gram of prompt and answer; 0 bans none.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    alpha: float = 0.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self):
        for name, right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("alpha", 0 <= self.alpha <= 1, "between 0 and 1"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or above"),
        ):
            if not right:
                raise UserError(f"sampling.{name} is {getattr(self, name)}; it must be {wanted}")


@dataclass
class Scores:
    """Both models' word on an answer of T tokens, measured while it was sampled. All tensors lie on the CPU."""

    vectors: dict[str, Tensor]  # (T,) fp32 each: those that minillm.rollout.scoring.score gives
    teacher: dict[str, Tensor]  # (T, ...) each: the parts of the teacher's rows


@dataclass
class Answer:
    """A prompt and what was sampled for it."""

    prompt: list[int]
    response: list[int]  # with the EOS that ended it, if one did
    ended: bool
    # (T,) fp32, CPU: under the distribution that each token was drawn from; greedy: under the model at temperature 1
    logprobs: Tensor
    extras: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # of the prompt, as minillm.models.batch.Sequence has them
    scores: Scores | None = None  # on the rank that sampled it, where both models have read it on the way
    teacher_prompt: list[int] | None = None  # as minillm.models.batch.TokenSequence has it


class Rollouts(Protocol):
    """An implementation declares what it can do; what a method needs beyond that is an error before the stage begins."""

    exact_noise: bool  # an answer is a function of (seed, key, draw): a resumed run samples the very same ones
    mixtures: bool  # it can draw from alpha * teacher + (1 - alpha) * student

    def sample(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        keys: Sequence[int],
        seed: int,
        draw: int = 0,
        who: Who = "student",
        batch_size: int,
        extras: Sequence[Mapping[str, Tensor]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """One answer for each prompt, in their order. All ranks call it with the same prompts and get all answers.

        Args:
            keys: a number for each prompt, which with `seed` and `draw` decides its noise. Two equal prompts with equal
                keys get equal answers.
            who: "mixture" draws from alpha * teacher + (1 - alpha) * student.
            batch_size: answers decoded side by side.
            extras: what the prompts show beside their ids, such as pixel values; None where none shows anything.
            progress: called with the number of answers that are done.

        Raises UserError for an empty prompt, a missing teacher, or one that cannot sample.
        """

    def weights_changed(self) -> None:
        """The student has taken a step: whoever keeps a copy of its weights needs the new ones."""


def require_rollouts(rollouts: Rollouts, samples: Sequence[Who], what: str) -> None:
    """Raises UserError where an implementation cannot sample as a method needs. `what` says who asks."""
    if "mixture" in samples and not rollouts.mixtures:
        raise UserError(
            f"{what} samples from a mixture of teacher and student, which {type(rollouts).__name__} cannot; let it sample "
            "from one of them"
        )
