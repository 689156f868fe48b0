"""What is wrong with a configuration, said to the person who wrote it: file, line, dotted path, what to do."""

from dataclasses import dataclass

from minillm import UserError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str  # as it was named on the command line; "command line" for an override
    line: int | None  # counted from 1
    path: str  # dotted; empty where the whole file is meant
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


class ConfigErrors(UserError):
    """Every problem of a configuration at once; nothing was loaded or written."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__(str(self))

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n  ".join([f"{count} in the configuration:", *map(str, self.problems)])
