"""metrics.jsonl, samples.jsonl and TensorBoard: written line by line, and truncated to where a resumed run goes on."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from minillm import UserError

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"


class MetricsLog:
    """Appends records to the files of a run's folder. A line is in the system's hands before `write` returns."""

    def __init__(self, output_dir: Path, report_to: Sequence[str] = ()):
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {name: (self.output_dir / name).open("ab") for name in (METRICS, SAMPLES)}
        self._to_tensorboard = "tensorboard" in report_to
        self._board = None
        self._purge_step: int | None = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and its numbers to TensorBoard where the run reports there.

        Numbers that are not finite become the strings NaN, Infinity and -Infinity, since JSON has no numbers for them;
        `read_numbers` turns them back.
        """
        self._append(METRICS, record)
        if self._to_tensorboard:
            self._write_scalars(record)

    def sample(self, record: Mapping[str, Any]) -> None:
        """Append a line to samples.jsonl."""
        self._append(SAMPLES, record)

    def state(self) -> dict[str, int]:
        """Flush all files to the disk; returns the bytes of each, which a checkpoint records for `truncate`."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def truncate(self, state: Mapping[str, int]) -> None:
        """Remove what was written after `state` was taken; a file that it does not name is emptied.

        A file shorter than recorded (a disk that lost its tail) keeps its complete lines.
        """
        for name, file in self._files.items():
            file.close()
            path = self.output_dir / name
            length = min(state.get(name, 0), path.stat().st_size)
            with path.open("r+b") as kept:
                if length < state.get(name, 0):
                    length = kept.read().rfind(b"\n") + 1
                kept.truncate(length)
            self._files[name] = path.open("ab")
        self._close_board()
        # TensorBoard hides what it has of later steps; of a run that starts anew, everything
        steps = (record.get("step", 0) for record in read_records(self.output_dir / METRICS))
        self._purge_step = max(steps, default=-1) + 1

    def close(self) -> None:
        """Close the files; a log that is closed twice stays closed."""
        for file in self._files.values():
            file.close()
        self._close_board()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        # a lone surrogate, from an escape in a data file, becomes its escape again instead of stopping the run
        self._files[name].write(line.encode(errors="backslashreplace"))
        self._files[name].flush()

    def _write_scalars(self, record: Mapping[str, Any]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.output_dir / TENSORBOARD), purge_step=self._purge_step)
        for tag, value in _scalars(record):
            self._board.add_scalar(tag, value, record["step"])
        self._board.flush()

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


class SilentLog:
    """The log of the ranks above 0, which writes nothing: rank 0 has the same records."""

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def sample(self, record: Mapping[str, Any]) -> None:
        pass

    def state(self) -> dict[str, int]:
        return {}

    def truncate(self, state: Mapping[str, int]) -> None:
        pass


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file of a run; [] where there is no file. A last line cut short by a kill is left out.

    Raises UserError, naming file and line, where any other line is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, unfinished = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object; a run writes one per line")
        records.append(record)
    return records


def read_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a record's values, including those that are not finite."""
    spelled = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    numbers = {}
    for name, value in values.items():
        if isinstance(value, str):
            value = spelled.get(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = float(value)
    return numbers


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    stage = record.get("stage", "main")
    if record.get("kind") == "eval":
        for set_name, metrics in {**record["sets"], "mean": record["mean"]}.items():
            for name, value in metrics.items():
                yield f"{stage}/eval/{record['who']}/{set_name}/{name}", value
    else:
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "stage_step"):
                yield f"{stage}/{record.get('kind', 'train')}/{name}", value


def plain(value: Any) -> Any:
    """The value in terms of JSON: numbers of numpy and torch as Python's, those that are not finite by name."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
