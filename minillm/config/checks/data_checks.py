"""Conditions between the keys of each source of data."""

from collections.abc import Iterator

from minillm.config.checks.facts import Facts, Found, Idle
from minillm.config.checks.packages import is_installed
from minillm.config.data import DataConfig, Pairs, RecordKeys, field_names
from minillm.config.evaluation import EvalConfig
from minillm.config.methods import Method
from minillm.config.models import TeacherSide


def training_prompts(facts: Facts, data: DataConfig) -> Iterator[Found]:
    """The keys of the training prompts go together."""
    for name in ("prompts", "forget"):
        source = getattr(data, name)
        if source is not None:
            yield from _keys_of_chats(("data", name), source.template)


def few_shot_prompts(facts: Facts, method: Method) -> Iterator[Found]:
    """The keys of the prompt by which the teacher is asked go together."""
    few_shot = method.needs().few_shot
    if few_shot is not None:
        yield from _keys_of_chats(("method", "few_shot"), few_shot.template)


def training_pairs(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """Pairs have two answers, the keys of their prompts go together, and the method trains on them."""
    if data.pairs is None:
        return
    if not method.needs().pairs:
        message = f"has no effect: method {method.name} trains on no pairs of the data with these keys"
        yield Idle("data.pairs", message, ("method.name",))
    yield from _keys_of_pairs(("data", "pairs"), data.pairs)


def evaluation_prompts(facts: Facts, eval: EvalConfig) -> Iterator[Found]:
    """The keys of all held-out prompts and questions go together."""
    for group in ("sets", "calibration"):
        for name, source in getattr(eval, group).items():
            yield from _keys_of_chats(("eval", group, name), source.template)
    for name, source in eval.held_out_pairs.items():
        yield from _keys_of_pairs(("eval", "preference", "pairs", name), source)


def contexts_read(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """A context is for a teacher that reads prompts, and may read others than the student does."""
    needs = method.needs()
    for name in ("prompts", "forget"):
        source = getattr(data, name)
        if isinstance(source, RecordKeys):
            yield from _keys_of_contexts(("data", name), source)
    if isinstance(data.forget, RecordKeys) and data.forget.teacher_context is not None:
        yield Found(
            "data.forget.teacher_context", "is for data.prompts: nobody compares answers to forget with a teacher"
        )
    if not isinstance(data.prompts, RecordKeys) or data.prompts.teacher_context is None:
        return
    if not needs.reads_context:
        asks = " but method.few_shot" if needs.few_shot is not None else ""
        message = f"has no effect: in method {method.name} no teacher reads the prompts{asks} with these keys"
        yield Idle("data.prompts.teacher_context", message, ("method.name",))
    elif needs.one_prompt is not None:
        message = f"cannot be told to the teacher alone: method {method.name} {needs.one_prompt} with these keys"
        yield Found("data.prompts.teacher_context", message, ("method.name",))


def held_out_contexts_read(facts: Facts, eval: EvalConfig, teacher: TeacherSide | None) -> Iterator[Found]:
    """A context of held-out prompts is for a teacher, and its keys go together."""
    for name, source in eval.sets.items():
        if isinstance(source, RecordKeys):
            yield from _keys_of_contexts(("eval", "sets", name), source)
            if teacher is None:
                message = "has no effect: there is no teacher that it could be told to"
                yield Idle(("eval", "sets", name, "teacher_context"), message, ("teacher",))


def _keys_of_contexts(path: tuple[str, ...], source: RecordKeys) -> Iterator[Found]:
    if source.teacher_context is None:
        for key in ("teacher_prompt", "max_teacher_prompt_length"):
            yield Idle((*path, key), "has no effect without teacher_context", ((*path, "teacher_context"),))
        return
    if sorted(field_names(source.teacher_prompt)) != ["context", "prompt"]:
        message = "must name {prompt} and {context}, each of them once, and nothing else; other fields are for teacher_context"
        yield Found((*path, "teacher_prompt"), message, ((*path, "teacher_context"),))
    if source.longest_for_teacher < source.max_prompt_length:
        message = (
            f"{source.longest_for_teacher} is less than max_prompt_length, {source.max_prompt_length}: the teacher reads the "
            "prompt, too"
        )
        yield Found((*path, "max_teacher_prompt_length"), message, ((*path, "max_prompt_length"),))


def packages_of_data(facts: Facts, data: DataConfig, eval: EvalConfig) -> Iterator[Found]:
    """The packages whose data are asked for are installed."""
    sources = {("data", name): getattr(data, name) for name in ("prompts", "pairs", "forget")}
    sources |= {("eval", "sets", name): source for name, source in eval.sets.items()}
    sources |= {("eval", "preference", "pairs", name): source for name, source in eval.held_out_pairs.items()}
    for place, source in sources.items():
        if source is not None and source.type == "easy_vqa" and not is_installed("easy-vqa"):
            message = "needs the package easy-vqa, which is not installed: pip install -e '.[vqa]' in minillm's folder"
            yield Found((*place, "type"), message)


def parsers_used(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """References are taken apart for a method that makes tasks of the parts."""
    if data.prompts is not None and not method.needs().tasks:
        message = f"has no effect on training by method {method.name}, which makes no tasks of rationales and labels"
        yield Idle("data.prompts.parser", message, ("method.name",))
    elif data.prompts is not None and len(method.needs().written) == 2:
        message = "has no effect on training: rationales and labels are the teacher's, read by method.few_shot.parser"
        yield Idle("data.prompts.parser", message, ("method.labels",))
    if data.forget is not None:
        yield Idle(
            "data.forget.parser", "has no effect: no method makes tasks of the answers to forget", ("method.name",)
        )


def forget_used(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """Answers to forget are for a method that unlearns."""
    if data.forget is not None and not method.needs().forget:
        message = f"has no effect: method {method.name} forgets nothing with these keys"
        yield Idle("data.forget", message, ("method.name",))


def held_out_parsers_used(facts: Facts, eval: EvalConfig) -> Iterator[Found]:
    """Held-out references are taken apart where labels are compared."""
    if eval.label_accuracy is None:
        for name in eval.sets:
            yield Idle(
                ("eval", "sets", name, "parser"), "has no effect without eval.label_accuracy", ("eval.label_accuracy",)
            )


def _keys_of_pairs(path: tuple[str, ...], source: Pairs) -> Iterator[Found]:
    if source.chosen == source.rejected:
        message = (
            f"is the field {source.rejected!r}, as {'.'.join((*path, 'chosen'))} is; name that of the other answer"
        )
        yield Found((*path, "rejected"), message, ((*path, "chosen"),))
    yield from _keys_of_chats(path, source.template)


def _keys_of_chats(path: tuple[str, ...], template: str) -> Iterator[Found]:
    if template != "chat":
        message = f"has no effect on template {template}; it is for chat"
        for key in ("system", "template_kwargs"):
            yield Idle((*path, key), message, ((*path, "template"),))


def corpus_used(facts: Facts, data: DataConfig, method: Method) -> Iterator[Found]:
    """Plain text is for a method that reads some."""
    if data.corpus is not None and not method.needs().corpus:
        message = f"has no effect: method {method.name} reads no plain text with these keys"
        yield Idle("data.corpus", message, ("method.name",))
