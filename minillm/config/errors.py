"""Everything that is wrong with a configuration, for the person who wrote it: file, line, key, and what to do."""

from dataclasses import dataclass
from typing import Literal

from minillm import UserError
from minillm.config.shape import KeyPath


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, at a path in the keys of a stage."""

    path: KeyPath
    message: str
    kind: Literal["missing", "unknown", "value", "idle"] = "value"  # idle: a key that does nothing in this stage
    instead: KeyPath | None = None  # for an unknown key, the one that was probably meant


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at the place where it was written."""

    file: str  # as it was named on the command line; "command line" for an override
    line: int | None  # counted from 1
    path: str  # dotted; empty where the whole file is meant
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


class ConfigErrors(UserError):
    """Every problem of a configuration at once. Nothing was loaded or written."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__(str(self))

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n  ".join([f"{count} in the configuration:", *map(str, self.problems)])
