"""The models that stages and runs of one process share, opened once: the last teacher, and the evaluator that keeps its
answers."""

from collections.abc import Callable
from pathlib import Path

import torch

from minillm.config.models import TeacherSide, teachers_of
from minillm.evaluate.evaluator import Evaluator
from minillm.teachers.open import OpenTeacher, open_teacher


class ModelCache:
    """Keeps one teacher, or the several of a stage, so that those of two never fill the memory, and one evaluator."""

    def __init__(self):
        self._teacher_key: object = None
        self._teacher: OpenTeacher | None = None
        self._evaluator_key: object = None
        self._evaluator: Evaluator | None = None

    def teacher(
        self,
        config: TeacherSide | None,
        output_dir: Path,
        device: torch.device,
        *,
        sharded: bool = False,
        trained: bool = False,
    ) -> OpenTeacher | None:
        """The teacher of a configuration; the one before is closed where it is another. All ranks call it together.

        Args:
            sharded: it will be sharded over the ranks, of which rank 0 reads it.
            trained: the stage changes it, so that nobody else may have it afterwards.
        """
        if config is None:
            return None
        if trained:
            self.close()
            return open_teacher(config, output_dir=output_dir, device=device, sharded=sharded)
        key = teacher_identity(config, output_dir), sharded, device
        if self._teacher is None or self._teacher_key != key:
            self.close()
            self._teacher = open_teacher(config, output_dir=output_dir, device=device, sharded=sharded)
            self._teacher_key = key
        return self._teacher

    def evaluator(self, key: object, make: Callable[[], Evaluator]) -> Evaluator:
        """The evaluator that was made for an equal key, or a new one."""
        if self._evaluator is None or self._evaluator_key != key:
            self._evaluator, self._evaluator_key = make(), key
        return self._evaluator

    def close(self) -> None:
        """Give back the teacher's memory. All ranks together."""
        if self._teacher is not None:
            self._teacher.teacher.close()
        self._teacher, self._teacher_key = None, None


def teacher_identity(config: TeacherSide | None, output_dir: Path) -> object:
    """Equal for equal teachers: what a stage has left is another model in another run."""
    found = teachers_of(config).values()
    names = [getattr(one, key, None) or "" for one in found for key in ("path", "tokenizer")]
    return config, output_dir if any(name.startswith("stage:") for name in names) else None
