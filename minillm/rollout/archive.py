"""Answers that the teacher writes once, kept in a file that outlives a kill (sequence-level distillation).

A line of JSON an answer, below a line that says how they were sampled. Noise is keyed by the prompt's key, so the
answers are the same whether the writing was interrupted or not.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from minillm import UserError
from minillm.distributed import collectives
from minillm.rollout.noise import AGAIN
from minillm.rollout.rollouts import Answer, Rollouts, Sampling

Record = dict


class AnswerArchive:
    """See the module. One run writes at a time: of its ranks the first, while all of them sample."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def write(
        self,
        rollouts: Rollouts,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        keys: Sequence[int],
        seed: int,
        batch_size: int,
        vocab_size: int,
        teacher: Record,
        extras: Sequence[Mapping[str, Tensor]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Let the teacher answer every prompt whose key has no answer yet; a kill loses the batch in hand at most.

        `teacher` says which one it is, in words that JSON knows. `extras` are what each prompt shows. `progress` is called
        after every batch with the number of answers there are of these prompts. Raises UserError where the file holds
        answers of another teacher, that were sampled in another way or to other prompts, and for repeated keys.
        """
        if len(set(keys)) != len(keys) or len(keys) != len(prompts):
            raise UserError(f"{len(prompts)} prompts need as many different keys; there are {len(set(keys))}")
        header = {"teacher": teacher, "sampling": asdict(sampling), "seed": seed, "vocab_size": vocab_size}
        found = self._on_rank_0(lambda: self._prepare(header))
        at_once = batch_size * collectives.world_size()
        prompt_of = dict(zip(keys, prompts, strict=True))
        shown = dict(zip(keys, extras or [{}] * len(keys), strict=True))
        for key in prompt_of.keys() & found.keys():
            if found[key]["prompt_crc"] != _crc(prompt_of[key]):
                raise UserError(
                    f"{self.path}: the answer with key {key} was written to another prompt; the data, or the words by which it is asked, have changed since. "
                    "Delete the file to have the answers written anew"
                )
        # answers to one prompt are written together
        missing = sorted(prompt_of.keys() - found.keys(), key=lambda key: (-len(prompt_of[key]), key % AGAIN, key))
        path = self.path if collectives.rank() == 0 else Path(os.devnull)
        with path.open("a", encoding="utf-8") as file:
            for start in range(0, len(missing), at_once):
                chosen = missing[start : start + at_once]
                answers = rollouts.sample(
                    [prompt_of[key] for key in chosen],
                    sampling,
                    keys=chosen,
                    seed=seed,
                    who="teacher",
                    batch_size=batch_size,
                    extras=[shown[key] for key in chosen],
                )
                file.write("".join(_line(_record(key, answer)) for key, answer in zip(chosen, answers, strict=True)))
                file.flush()
                if collectives.rank() == 0:
                    os.fsync(file.fileno())
                if progress is not None:
                    progress(len(prompts) - len(missing) + start + len(chosen))

    def read(self) -> dict[int, list[int]]:
        """Key -> response ids, with the EOS of those that ended. Empty where there is no file."""
        found = self._on_rank_0(lambda: self._read()[1])
        return {key: record["response"] for key, record in found.items()}

    def read_matching(self, prompts: Mapping[int, list[int]], wanted: Record) -> dict[int, list[int]]:
        """Key -> response ids of these prompts, from an archive that another run has written.

        Args:
            prompts: the ids of each prompt by its key.
            wanted: entries that the archive's first line must have.

        Raises UserError, which says what differs, for answers to other prompts, or that were sampled in another way.
        """

        def read() -> dict[int, Record]:
            header, found, _ = self._read()
            for name, value in wanted.items():
                before = (header or {}).get(name)
                if before != value:
                    raise UserError(f"{self.path}: its answers have another {name}: {before}; asked for is {value}")
            lacking = [
                key for key, prompt in prompts.items() if key not in found or found[key]["prompt_crc"] != _crc(prompt)
            ]
            if lacking:
                raise UserError(
                    f"{self.path} has no answers to {len(lacking)} of {len(prompts)} prompts (the first is number "
                    f"{min(lacking) + 1}): the data, its template or its tokenizer is another than it was written for"
                )
            return {key: found[key] for key in prompts}

        return {key: record["response"] for key, record in self._on_rank_0(read).items()}

    def _on_rank_0(self, work: Callable[[], dict[int, Record]]) -> dict[int, Record]:
        if collectives.world_size() == 1:
            return work()
        return {record["key"]: record for record in collectives.on_rank_0(lambda: list(work().values()))}

    def _prepare(self, header: Record) -> dict[int, Record]:
        """The answers that are there; afterwards the file exists, and ends with a whole line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before, found, whole = self._read()
        if before is not None and before != header:
            changed = [name for name in header if before.get(name) != header[name]]
            raise UserError(
                f"{self.path}: its answers were sampled with another {', '.join(changed)}: "
                f"{[before.get(name) for name in changed]}, now {[header[name] for name in changed]}. "
                "Delete the file to have them written anew"
            )
        with self.path.open("a+b") as file:
            file.truncate(whole)
            if before is None:
                file.write(_line(header).encode())
        return found

    def _read(self) -> tuple[Record | None, dict[int, Record], int]:
        """The header, the answers by key, and the bytes up to the end of the last whole line."""
        if not self.path.exists():
            return None, {}, 0
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1  # a kill can leave a part of a line behind
        try:
            header, *records = [json.loads(line) for line in content[:whole].splitlines()] or [None]
            return header, {record["key"]: record for record in records}, whole
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{self.path} is not an archive of answers: {problem}") from problem


def _record(key: int, answer: Answer) -> Record:
    return {"key": key, "prompt_crc": _crc(answer.prompt), "response": answer.response, "ended": answer.ended}


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _crc(ids: Sequence[int]) -> int:
    return zlib.crc32(" ".join(map(str, ids)).encode())
