"""The rollout buffer: answers with what was measured on them once, so that inner epochs never run the teacher."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minillm import UserError
from minillm.models.batch import TokenSequence
from minillm.storage.atomic import sync
from minillm.storage.snapshot import SavedPart

VECTOR = "vector."  # prefix of the vectors' names in a state
TEACHER = "teacher_"  # of the parts of the teacher's rows
EXTRA = "extra."  # of what prompts show beside their ids
FOR_TEACHER = "for_teacher"  # of the prompts that the teacher reads in the place of the student's


@dataclass
class Rollout:
    """One sampled answer of T tokens. All tensors lie on the CPU."""

    key: int  # of the prompt
    prompt: list[int]
    response: list[int]  # with the EOS that ended it, if one did
    ended: bool
    vectors: dict[str, Tensor] = field(default_factory=dict)  # (T,) each; `score` says which, methods add theirs
    # (T, ...) each: the parts of the teacher's rows that predict each response token, {"hidden": (T, H_t)} of a teacher
    # that gives hidden states. Empty on ranks that did not score the answer
    teacher: dict[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # of the prompt, as TokenSequence has them
    teacher_prompt: list[int] | None = None  # likewise
    judge: str | None = None  # likewise

    @property
    def sequence(self) -> TokenSequence:
        of_teacher = {"teacher_prompt": self.teacher_prompt, "judge": self.judge}
        return TokenSequence(self.prompt, self.response, self.key, self.extras, **of_teacher)

    @property
    def width(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


class RolloutBuffer(Sequence[Rollout]):
    """A list of rollouts that can be written to safetensors and read back bit for bit."""

    def __init__(self, rollouts: Iterable[Rollout] = ()):
        self.rollouts = list(rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    def __getitem__(self, index: int | slice) -> "Rollout | RolloutBuffer":
        return RolloutBuffer(self.rollouts[index]) if isinstance(index, slice) else self.rollouts[index]

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)

    def state(self) -> dict[str, Tensor]:
        """Everything as a few flat tensors: the tokens of all rollouts one after the other, and their counts.

        Raises UserError where rollouts hold different vectors, or one has a length other than its response's.
        """
        state = {
            "keys": _integers(rollout.key for rollout in self),
            "ended": torch.tensor([rollout.ended for rollout in self], dtype=torch.bool),
        }
        for name in ("prompt", "response"):
            sequences = [getattr(rollout, name) for rollout in self]
            state[f"{name}_lengths"] = _integers(map(len, sequences))
            state[f"{name}_ids"] = _integers(token for sequence in sequences for token in sequence)
        if any(rollout.teacher_prompt for rollout in self):  # of length 0 where it is the student's
            prompts = [rollout.teacher_prompt or [] for rollout in self]
            state[f"{FOR_TEACHER}_lengths"] = _integers(map(len, prompts))
            state[f"{FOR_TEACHER}_ids"] = _integers(token for prompt in prompts for token in prompt)
        for name in dict.fromkeys(name for rollout in self for name in rollout.vectors):
            state[VECTOR + name] = self._joined(name, [rollout.vectors.get(name) for rollout in self])
        scored = RolloutBuffer(rollout for rollout in self if rollout.teacher)
        if scored:
            for name in scored[0].teacher:
                state[TEACHER + name] = scored._joined(name, [rollout.teacher.get(name) for rollout in scored])
            state["scored"] = torch.tensor([bool(rollout.teacher) for rollout in self])
        for name in dict.fromkeys(name for rollout in self for name in rollout.extras):
            parts = [rollout.extras[name] if name in rollout.extras else None for rollout in self]
            shown = next(part for part in parts if part is not None)
            nothing = shown.new_empty((0,) * shown.dim())
            parts = [nothing if part is None else part for part in parts]
            state[EXTRA + name] = torch.cat([part.flatten() for part in parts])
            state[f"{EXTRA}{name}_shapes"] = torch.tensor([part.shape for part in parts])
        if any(rollout.judge is not None for rollout in self):
            names = [(rollout.judge or "").encode() for rollout in self]
            state["judge_lengths"] = _integers(map(len, names))
            state["judge_bytes"] = torch.tensor(list(b"".join(names)), dtype=torch.uint8)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "RolloutBuffer":
        """The buffer whose `state` this is. Raises UserError where a part is missing or does not fit the others."""
        try:
            return cls(_rollouts(state))
        except (KeyError, RuntimeError) as problem:
            raise UserError(f"not the state of a rollout buffer: {problem}; it holds {sorted(state)}") from problem

    def _joined(self, name: str, parts: list[Tensor | None]) -> Tensor:
        for rollout, part in zip(self, parts, strict=True):
            if part is None or set(rollout.vectors) != set(self.rollouts[0].vectors):
                raise UserError(
                    f"rollout {rollout.key} holds {_contents(rollout)}, but the first one {_contents(self.rollouts[0])}; "
                    "all must hold the same"
                )
            if len(part) != len(rollout.response):
                raise UserError(
                    f"rollout {rollout.key}: {name} has {len(part)} rows for a response of {len(rollout.response)} tokens"
                )
        return torch.cat(parts)


def buffer_file(name: str, buffer: RolloutBuffer) -> SavedPart:
    """A part of state/. It needs no copy: nothing changes a buffer that methods have collected."""

    def write(_: None, folder: Path) -> None:
        save_file(buffer.state(), folder / name)
        sync(folder / name)

    return SavedPart(lambda: None, write)


def _contents(rollout: Rollout) -> str:
    return ", ".join([*rollout.vectors, *(TEACHER + name for name in rollout.teacher)]) or "nothing"


def _rollouts(state: Mapping[str, Tensor]) -> list[Rollout]:
    prompts = _split(state["prompt_ids"], state["prompt_lengths"])
    lengths = state["response_lengths"]
    responses = _split(state["response_ids"], lengths)
    vectors = {
        name.removeprefix(VECTOR): _split(value, lengths) for name, value in state.items() if name.startswith(VECTOR)
    }
    for_teacher: Sequence[Tensor] = [torch.empty(0)] * len(lengths)
    if f"{FOR_TEACHER}_ids" in state:
        for_teacher = _split(state[f"{FOR_TEACHER}_ids"], state[f"{FOR_TEACHER}_lengths"])
    teacher: list[dict[str, Tensor]] = [{} for _ in lengths]
    if "scored" in state:
        rows = state["scored"].nonzero()[:, 0].tolist()
        for name in (name for name in state if name.startswith(TEACHER)):
            for row, part in zip(rows, _split(state[name], lengths[rows]), strict=True):
                teacher[row][name.removeprefix(TEACHER)] = part
    extras: list[dict[str, Tensor]] = [{} for _ in lengths]
    for name in (name for name in state if name.startswith(EXTRA) and f"{name}_shapes" in state):
        shapes = state[f"{name}_shapes"]  # (R, dimensions)
        for row, part in enumerate(_split(state[name], shapes.prod(1))):
            if len(part):
                extras[row][name.removeprefix(EXTRA)] = part.view(shapes[row].tolist())
    judges: list[str | None] = [None] * len(lengths)
    if "judge_bytes" in state:
        names = _split(state["judge_bytes"], state["judge_lengths"])
        judges = [bytes(name.tolist()).decode() or None for name in names]
    return [
        Rollout(
            key=int(key),
            prompt=prompts[row].tolist(),
            response=responses[row].tolist(),
            ended=bool(state["ended"][row]),
            vectors={name: parts[row] for name, parts in vectors.items()},
            teacher=teacher[row],
            extras=extras[row],
            teacher_prompt=for_teacher[row].tolist() or None,
            judge=judges[row],
        )
        for row, key in enumerate(state["keys"])
    ]


def _split(joined: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:  # (sum of lengths, ...), (R,)
    return joined.split(lengths.tolist())


def _integers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
