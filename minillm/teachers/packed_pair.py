"""The models of a pair that read their batches packed: as `train.packing` asks, and as each of them can."""

from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from minillm.config.training import Packing
from minillm.distributed import collectives
from minillm.models.loading import is_hollow
from minillm.models.packing import attends_by_sequence, pack_batches
from minillm.models.packing_check import packing_problem
from minillm.teachers.in_turn import TeacherInTurn
from minillm.teachers.pair import Models
from minillm.teachers.preflight import Row, of_all
from minillm.teachers.several import SeveralTeachers
from minillm.teachers.vocabularies import PreflightError

_problems: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()  # of the models that were run packed


def settle_packing(models: Models, asked: Packing) -> Row:
    """Have those models of a pair read their batches packed that `asked` says and that can; returns a row of the preflight
    table that says which.

    All ranks call it together, where each can run the models, or rank 0 alone has their weights. Raises PreflightError for
    a model that is asked to read packed batches, and cannot.
    """
    student, teacher = _settle("student", models.student, asked), models.teacher
    if isinstance(teacher, SeveralTeachers):
        cells = [
            "off: in memory in turn"
            if isinstance(one, TeacherInTurn)
            else _settle(f"teacher {name!r}", one.model, asked)
            for name, one in teacher.teachers.items()
        ]
        return "packing", student, of_all([*teacher.teachers], cells)
    if teacher is None or teacher.model is None:
        return "packing", student, "-"
    return "packing", student, student if teacher.model is models.student else _settle("teacher", teacher.model, asked)


def _settle(who: str, model: PreTrainedModel | None, asked: Packing) -> str:
    """Settle one model; returns its cell of the row."""
    if model is None:
        return "-"
    pack_batches(model, False)
    if asked == "off" or asked == "auto" and not attends_by_sequence(model):
        return "off"
    problem = _problem(model)
    if problem is None:
        pack_batches(model, True)
        return "on"
    if asked == "on":
        raise PreflightError(f"train.packing: on: {who}: {problem}; write auto, with which it is not packed, or off")
    return f"off: {problem}"


def _problem(model: PreTrainedModel) -> str | None:
    """The result of the check of a model, found once for each: the same on every rank."""
    if model not in _problems:
        found = collectives.together(lambda: None if is_hollow(model) else packing_problem(model))
        _problems[model] = collectives.gather(found)[0]  # rank 0 always has the weights
    return _problems[model]
