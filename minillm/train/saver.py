"""The checkpoints of a stage and its best model, written from copies by a thread while the next steps are taken.

A thread writes as the loop itself would: into a folder of another name, flushed, signed and renamed, the older checkpoints
removed only afterwards. One folder is written at a time, in the order in which they were asked for, so that there is one
copy at most, and best/ is never behind a checkpoint that speaks of it. Of several ranks each has such a thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from minillm.config.training import SaveConfig
from minillm.distributed import collectives
from minillm.models.saving import tokenizer_part, weights_part
from minillm.storage.atomic import write_folder
from minillm.storage.background import BackgroundWork
from minillm.storage.checkpoint import write_checkpoint
from minillm.storage.manifest import sign
from minillm.storage.snapshot import SavedPart
from minillm.teachers.pair import Models

Fill = Callable[[Path], None]


class Saver:
    """See the module. Leaving its context waits for what is being written, except on Ctrl-C.

    Every method raises what kept a folder from being written, that of an earlier call too.
    """

    def __init__(self, config: SaveConfig, models: Models, output_dir: Path, note: Callable[[str], None]):
        """`note` is told of a failed write where another error ends the run."""
        self.keep, self.models, self.output_dir, self.note = config.keep, models, output_dir, note
        self.in_background = config.in_background
        # what ranks say to each other while they write must not meet what they say in a step
        self._group = collectives.group_beside() if config.in_background else None
        self._work = BackgroundWork()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None:
            self.finish()
        elif issubclass(kind, Exception):
            try:
                self.finish()
            except Exception as error:
                self.note(f"what was being saved is not on the disk: {type(error).__name__}: {error}")

    def checkpoint(self, step: int, beside: Sequence[SavedPart], state: Sequence[SavedPart], *, wait: bool) -> None:
        """Save checkpoint-<step>.

        Args:
            beside: parts beside the student's own files.
            state: parts of state/.
        """
        parts = [*self._student(), *beside, *map(_in_state, state)]
        self._save(parts, lambda fill: write_checkpoint(self.output_dir, step, fill, keep=self.keep), wait=wait)

    def model(self, folder: Path) -> None:
        """Save the student alone in the place of `folder`."""
        self._save(self._student(), lambda fill: write_folder(folder, fill, sign=sign), wait=False)

    def check(self) -> None:
        """Do not wait for what is being written. All ranks call it, and raise together."""
        if collectives.anywhere(self._work.failed):
            self.finish()

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        self._work.finish()

    def _student(self) -> list[SavedPart]:
        return [weights_part(self.models.student, self.models.tokenizer), self._tokenizer]

    @cached_property
    def _tokenizer(self) -> SavedPart:
        """The same in every folder of the stage."""
        return tokenizer_part(self.models.tokenizer).copied()

    def _save(self, parts: Sequence[SavedPart], write: Callable[[Fill], None], *, wait: bool) -> None:
        self.finish()
        in_background = self.in_background and not wait
        kept = [part.copied() for part in parts] if in_background else parts

        def fill(folder: Path) -> None:
            for part in kept:
                part.save(folder)

        def write_beside_the_steps() -> None:
            with collectives.exchanging_by(self._group):
                write(lambda folder: collectives.together(lambda: fill(folder)))

        if in_background:
            self._work.start(write_beside_the_steps)
        else:
            write(fill)


def _in_state(part: SavedPart) -> SavedPart:
    def write(state: object, folder: Path) -> None:
        (folder / "state").mkdir(exist_ok=True)
        part.write(state, folder / "state")

    return replace(part, write=write)
