"""Answers that the teacher writes once, in a file that survives a kill with all but the batch in hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from minillm.models.pair import Models
from minillm.rollout.sampling import Sampling, sample


class AnswerArchive:
    """A JSON line an answer: {"key", "response"}."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[int, list[int]]:
        """Response ids by key. A last line that a kill cut short is not an answer."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return {record["key"]: record["response"] for record in map(json.loads, lines)}

    def write(
        self,
        models: Models,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        keys: Sequence[int],
        seed: int,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Have the teacher answer the prompts that the file lacks. The noise is keyed by prompt, so an interrupted
        archive ends up the same as an unbroken one."""
        done = self.read()
        missing = [index for index, key in enumerate(keys) if key not in done]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_partial_line()
        missing.sort(key=lambda index: len(prompts[index]))
        with self.path.open("a", encoding="utf-8") as file:
            for start in range(0, len(missing), batch_size):
                chosen = missing[start : start + batch_size]
                answers = sample(
                    models,
                    [prompts[index] for index in chosen],
                    sampling,
                    keys=[keys[index] for index in chosen],
                    seed=seed,
                    who="teacher",
                    batch_size=batch_size,
                )
                for index, answer in zip(chosen, answers, strict=True):
                    file.write(json.dumps({"key": keys[index], "response": answer.response}) + "\n")
                file.flush()
                if progress is not None:
                    progress(len(done) + start + len(chosen))

    def _cut_partial_line(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
