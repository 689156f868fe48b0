"""The keys of method opd; the formulas are in minillm/methods/opd.py."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from minillm import UserError
from minillm.config.functions import load_function
from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds


class OPD(MethodConfig):
    """On-policy distillation: policy gradient of the reverse KL at the student's own tokens, each with its own reward."""

    name: Literal["opd"]
    cliprange: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="PPO's clip range of the ratio to the student that sampled; null (published): no clip"
    )
    task_reward: str | None = Field(
        None,
        description="A function of yours, package.module:function or file.py:function, which is imported and called as "
        "f(prompt_text, answer_text, record) for every answer, on rank 0; the number that it returns is added to the "
        "advantage of every token of the answer. record is {index, references} of the prompt. null: none",
    )
    task_reward_weight: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="Weight of the task reward beside the log-ratios, in nats; 0 only measures it"
    )
    summary: ClassVar[str] = "on-policy distillation: policy gradient of the reverse KL at sampled tokens"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "sampled_reverse_kl_nats": ("Reverse KL of sampled tokens", "nats/token"),
        "task_reward": ("Task reward", "mean over answers"),
    }

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("policy", ("answers",), teacher=True, shared=True),),
            samples=("student",),
            several_answers=True,
            buffered=True,
            neutral_sampling=True,
            weighs_temperature=True,
            teacher=True,
        )

    def task_reward_function(self) -> Callable[[str, str, dict[str, Any]], float] | None:
        """The function that `task_reward` names, imported; None without one. Raises UserError where that fails."""
        if self.task_reward is None:
            return None
        return load_function(self.task_reward, "prompt_text", "answer_text", "record")

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        try:
            self.task_reward_function()
        except UserError as problem:
            yield "task_reward", str(problem), ()

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if self.task_reward is None:
            yield "task_reward_weight", "has no effect: there is no task_reward", "task_reward"


KEYS = OPD
