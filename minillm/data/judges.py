"""The teacher of every record, where each has one of several: the one that a field of it names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillm.config.models import SeveralTeachersConfig, TeacherSide
from minillm.data.sources import DataError, Place


@dataclass(frozen=True)
class Judges:
    """The field that names a record's teacher, and the names that there are."""

    field: str
    names: tuple[str, ...]

    def of(self, where: Place, record: Mapping[str, Any]) -> str:
        """The teacher of a record. Raises DataError, naming the record, where it names none, or one that there is not."""
        known = f"teachers_by.field is {self.field!r}, and the teachers are {', '.join(self.names)}"
        if self.field not in record:
            raise DataError(f"{where}: the record has no field {self.field!r}, which would name its teacher; {known}")
        name = record[self.field]
        if name not in self.names:
            raise DataError(f"{where}: {self.field} is {name!r}, which is no teacher; {known}")
        return name


def judges_of(teacher: TeacherSide | None) -> Judges | None:
    """The way in which records name their teacher; None where there is one, or all judge every record."""
    if not isinstance(teacher, SeveralTeachersConfig) or teacher.by.field is None:
        return None
    return Judges(teacher.by.field, tuple(teacher.teachers))
