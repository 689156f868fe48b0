"""Conditions between `teachers`, `teachers_by`, and the texts that several teachers divide."""

import re
from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found
from minillm.config.data import DataConfig, PlainPrompts
from minillm.config.evaluation import EvalConfig
from minillm.config.methods import Method
from minillm.config.models import AnyTeacherConfig, TeachersByConfig

WAYS = "`field`, the field of every record that names its teacher, or `weights`, each teacher's part in the loss on every record"
NAMELESS = "which could name their teacher; use records with fields, or teachers_by.weights"
NAME = re.compile(r"[\w-]+")


def several_teachers(
    facts: Facts, teachers: dict[str, AnyTeacherConfig], teachers_by: TeachersByConfig | None
) -> Iterator[Found]:
    """Several teachers are two at least, stand in the place of one, and it is said once who judges what."""
    if not teachers:
        if teachers_by is not None:
            yield Found("teachers_by", "has no effect without `teachers`", ("teachers",))
        return
    if facts.data.get("teacher") is not None:
        message = (
            "there is a `teacher` as well; `teachers` stand in its place: leave one of the two out (null takes it away)"
        )
        yield Found("teachers", message, ("teacher",))
    if len(teachers) == 1:
        yield Found("teachers", f"has {next(iter(teachers))} alone; write one teacher as `teacher`")
    for name in teachers:
        if not NAME.fullmatch(name):
            yield Found(("teachers", name), "a teacher's name is letters, digits, - and _")
    if teachers_by is None:
        yield Found("teachers_by", f"missing: say who teaches which record, by {WAYS}", ("teachers",))
        return
    if (teachers_by.field is None) == (teachers_by.weights is None):
        yield Found("teachers_by", f"expected one of {WAYS}")
    elif teachers_by.weights is not None and set(teachers_by.weights) != set(teachers):
        message = f"names {', '.join(teachers_by.weights) or 'nobody'}; the teachers are {', '.join(teachers)}"
        yield Found("teachers_by.weights", message, ("teachers",))


def records_have_fields(
    facts: Facts, teachers_by: TeachersByConfig | None, data: DataConfig, method: Method
) -> Iterator[Found]:
    """The texts that several teachers divide by a field are records, which have fields."""
    if teachers_by is None or teachers_by.field is None:
        return
    if isinstance(data.prompts, PlainPrompts) and method.needs().teacher:
        yield Found("data.prompts.type", f"text prompts have no fields, {NAMELESS}", ("teachers_by.field",))
    if any(term.teacher and "corpus" in term.rows for term in method.needs().terms):
        message = f"in method {method.name} the teacher reads blocks of data.corpus, {NAMELESS}"
        yield Found("teachers_by.field", message, ("method.name",))


def held_out_records_have_fields(
    facts: Facts, teachers_by: TeachersByConfig | None, eval: EvalConfig
) -> Iterator[Found]:
    """The prompts on which the student is compared with its teachers are records, too."""
    if teachers_by is None or teachers_by.field is None or not eval.teacher:
        return
    for name, prompts in eval.sets.items():
        if isinstance(prompts, PlainPrompts):
            message = f"text prompts have no fields, {NAMELESS}; or set eval.teacher to false"
            yield Found(("eval", "sets", name, "type"), message, ("teachers_by.field", "eval.teacher"))
    for name in () if eval.preference is None or eval.preference.reference_free else eval.held_out_pairs:
        message = "pairs name no teacher of theirs that they could be compared with; set eval.preference.reference_free"
        yield Found(("eval", "preference", "pairs", name), message, ("teachers_by.field",))
