"""Checks of a method's declared needs: data, a teacher, and the abilities that it asks of both."""

from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found, Idle
from minillm.config.data import ArithmeticPrompts, DataConfig, PlainPrompts, PydocPrompts
from minillm.config.evaluation import EvalConfig
from minillm.config.methods import Method
from minillm.config.models import SeveralTeachersConfig, StudentConfig, TeacherSide
from minillm.config.needs import ABILITIES

# A need that is data -> the method's use of it, as in "method kd ...".
MATERIAL = {
    "prompts": "trains on prompts",
    "forget": "lowers the likelihood of the answers of a second set of prompts",
    "pairs": "trains on pairs of a chosen and a rejected answer",
    "corpus": "reads plain text",
}


def material(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """All data that the method needs is given."""
    for need, does in MATERIAL.items():
        if not getattr(method.needs(), need):
            continue
        if need not in DataConfig.model_fields:
            yield Found("method.name", f"method {method.name} {does}, which no key of `data` gives")
        elif getattr(data, need) is None:
            why, reads = _why(method, need)
            yield Found(f"data.{need}", f"missing: method {method.name} {does}{why}", reads)


def images_shown(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """Prompts come from where images may come from, where the method needs them."""
    if method.needs().images and isinstance(data.prompts, PydocPrompts | ArithmeticPrompts | PlainPrompts):
        why, reads = _why(method, "images")
        message = f"{data.prompts.type} prompts show no images, which method {method.name} trains on{why}"
        yield Found("data.prompts.type", message, reads)


def fields_there(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """Prompts come from records with fields, where the method makes tasks of these."""
    if method.needs().tasks and isinstance(data.prompts, PlainPrompts):
        message = f"text prompts have no fields, of which method {method.name} makes its tasks"
        yield Found("data.prompts.type", message, ("method.name",))


def teacher_needed(facts: Facts, teacher: TeacherSide | None, method: Method) -> Iterator[Found]:
    """There is a teacher where the method needs one, and it can do what the method asks of it."""
    needs = method.needs()
    if teacher is None:
        if needs.teacher:
            why, reads = _why(method, "teacher")
            yield Found("teacher", f"missing: method {method.name} needs one{why}", reads)
        return
    lacking = [ABILITIES.get(ability, ability) for ability in sorted(needs.required_abilities - teacher.abilities)]
    if lacking:
        message = (
            f"method {method.name} needs a teacher that can {' and '.join(lacking)}, which {teacher.called} cannot"
        )
        key = "teachers" if isinstance(teacher, SeveralTeachersConfig) else "teacher"
        yield Found(key, message, ("method.name",))


def evaluations_made(facts: Facts, eval: EvalConfig, method: Method) -> Iterator[Found]:
    """A stage is evaluated while it trains where the method adapts to that."""
    if not method.needs().evaluations:
        return
    for key in ("sets", "steps"):
        if not getattr(eval, key):
            why, reads = _why(method, "evaluations")
            yield Found(
                f"eval.{key}", f"missing: method {method.name} adapts to its evaluations in training{why}", reads
            )


def _why(method: Method, need: str) -> tuple[str, tuple[str, ...]]:
    """(words, keys) on the key of the method that a need comes from, with the value that does away with it; or empty."""
    key = method.needs().because.get(need)
    if key is None:
        return "", ()
    without = method.value_without(need)
    instead = "" if without is None else f"; give it here, or set method.{key} to {_show(without)}"
    return f" while method.{key} is {_show(getattr(method, key))}{instead}", (f"method.{key}",)


def adapters_trained(facts: Facts, student: StudentConfig, method: Method) -> Iterator[Found]:
    """Adapters are asked for only where the student is trained."""
    if student.lora is not None and "student" not in method.needs().trains:
        yield Idle("student.lora", f"has no effect: method {method.name} does not train the student", ("method.name",))


def own_keys(facts: Facts, method: Method) -> Iterator[Found]:
    """The method's own keys go together, as its configuration class says."""
    for key, message, others in method.findings():
        yield Found(f"method.{key}", message, tuple(f"method.{other}" for other in others))
    for key, message, because in method.idle_keys():
        yield Idle(f"method.{key}", message, (f"method.{because}",))


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value).lower()
