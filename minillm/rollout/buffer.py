"""Sampled answers with everything that inner epochs need, so that they never run the teacher again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.batch import Pair


@dataclass
class Rollout:
    """One answer of T tokens."""

    key: int  # of its prompt
    prompt: list[int]
    response: list[int]
    ended: bool
    vectors: dict[str, Tensor]  # (T,) each: log-probs and rewards from scoring, advantages and weights from the method
    teacher_hidden: Tensor  # (T, H_t), in the teacher's dtype

    @property
    def pair(self) -> Pair:
        return self.prompt, self.response


class RolloutBuffer(Sequence[Rollout]):
    """A list of rollouts that goes through safetensors and comes back bit for bit."""

    def __init__(self, rollouts: Sequence[Rollout]):
        self.rollouts = list(rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    def __getitem__(self, index):
        return self.rollouts[index]

    def state(self) -> dict[str, Tensor]:
        """Concatenated tensors by name."""
        rollouts = self.rollouts
        state = {
            "keys": torch.tensor([rollout.key for rollout in rollouts]),
            "ended": torch.tensor([rollout.ended for rollout in rollouts]),
            "prompts": torch.tensor([token for rollout in rollouts for token in rollout.prompt]),
            "prompt_lengths": torch.tensor([len(rollout.prompt) for rollout in rollouts]),
            "responses": torch.tensor([token for rollout in rollouts for token in rollout.response]),
            "response_lengths": torch.tensor([len(rollout.response) for rollout in rollouts]),
            "teacher_hidden": torch.cat([rollout.teacher_hidden for rollout in rollouts]),
        }
        for name in rollouts[0].vectors:
            state[f"vectors.{name}"] = torch.cat([rollout.vectors[name] for rollout in rollouts])
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "RolloutBuffer":
        """The inverse of `state`."""
        responses = state["response_lengths"].tolist()
        split = {
            name.removeprefix("vectors."): tensor.split(responses)
            for name, tensor in state.items()
            if name.startswith("vectors.")
        }
        prompts = state["prompts"].split(state["prompt_lengths"].tolist())
        texts, hidden = state["responses"].split(responses), state["teacher_hidden"].split(responses)
        keys, ended = state["keys"].tolist(), state["ended"].tolist()
        return cls(
            Rollout(
                keys[i],
                prompts[i].tolist(),
                texts[i].tolist(),
                ended[i],
                {name: parts[i] for name, parts in split.items()},
                hidden[i],
            )
            for i in range(len(keys))
        )
