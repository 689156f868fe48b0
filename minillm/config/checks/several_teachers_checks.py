"""Conditions between `teachers`, `teachers_by`, and the texts that several teachers divide."""

import re
from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found, Idle
from minillm.config.data import DataConfig, PlainPrompts
from minillm.config.evaluation import EvalConfig
from minillm.config.methods import Method
from minillm.config.models import AnyTeacherConfig, TeacherConfig, TeachersByConfig
from minillm.config.training import Engine, TrainConfig

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


def teachers_in_turn(
    facts: Facts,
    teachers: dict[str, AnyTeacherConfig],
    teachers_by: TeachersByConfig | None,
    method: Method,
    engine: Engine,
    train: TrainConfig,
) -> Iterator[Found | Idle]:
    """Teachers that are in memory one at a time are whole, and read texts that are known before they are learned from."""
    if teachers_by is None:
        return
    if teachers_by.in_memory == "all":
        yield Idle("teachers_by.turn_steps", "has no effect: all are in memory", ("teachers_by.in_memory",))
        return
    local = [name for name, one in teachers.items() if isinstance(one, TeacherConfig)]
    if len(local) < 2:
        message = f"has no effect: of the teachers {' and '.join(local) or 'none'} is local, and of others the head alone is here"
        yield Found("teachers_by.in_memory", message, ("teachers",))
    needs = method.needs()
    if needs.buffered:
        message = f"has no effect: in method {method.name} each reads a whole buffer in its turn"
        yield Idle("teachers_by.turn_steps", message, ("method.name",))
    if needs.prompts and any(term.teacher and "corpus" in term.rows for term in needs.terms):
        message = (
            f"method {method.name} has the teachers read blocks of data.corpus beside its prompts, step by step, for which "
            "every one would be opened in every step; have all in memory, or leave these terms out"
        )
        yield Found("teachers_by.in_memory", message, ("method.name",))
    if engine.type == "deepspeed" and engine.stage == 3 and not engine.replicate_teacher:
        message = (
            "stage 3 shards the teachers over the ranks, where all stay; one at a time is whole on every rank: set "
            "engine.replicate_teacher"
        )
        yield Found("teachers_by.in_memory", message, ("engine.stage", "engine.replicate_teacher"))
    if train.packing == "on":
        message = (
            "teachers that are opened in turn read padded batches: write auto, with which the student is packed alone"
        )
        yield Found("train.packing", message, ("teachers_by.in_memory",))


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
