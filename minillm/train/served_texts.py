"""The check that the servers of a teacher read texts as long as those of a stage, before the first step."""

from collections.abc import Iterable, Mapping

from minillm.config.loader.run_plan import Stage
from minillm.data.instructions import PromptSet
from minillm.teachers.remote import RemoteTeacher
from minillm.teachers.several import members
from minillm.teachers.teacher import Teacher
from minillm.train.stage_data import StageData


def require_served_lengths(
    teacher: Teacher | None, stage: Stage, read: StageData, held_out: Mapping[str, PromptSet]
) -> None:
    """Raises UserError for data with texts, or with prompts that can be answered, beyond what the servers of a teacher read.

    Of several teachers each reads the records that are its.
    """
    for name, one in members(teacher).items():
        if not isinstance(one, RemoteTeacher):
            continue
        whose = "" if name is None else f", read by teacher {name!r}"
        for what, longest in _longest_texts(stage, read, held_out, judge=name).items():
            one.require_length(what + whose, longest)


def _longest_texts(
    stage: Stage, read: StageData, held_out: Mapping[str, PromptSet], *, judge: str | None
) -> dict[str, int]:
    """Data -> the most tokens of a text of it that a teacher may be sent."""
    config, needs = stage.config, stage.config.method.needs()
    answer = config.rollout.max_new_tokens if needs.samples else 0
    lengths: dict[str, Iterable[int]] = {
        name: (_longest(example, answer) for example in one.judged_by(judge).examples)
        for name, one in (("data.prompts", read.prompts), ("data.forget", read.forget))
        if one is not None
    }
    if read.pairs is not None:
        both = (side for pair in read.pairs for side in (pair.chosen, pair.rejected))
        lengths["data.pairs"] = (len(one.prompt) + max(len(one.response), answer) for one in both)
    if read.corpus is not None:
        lengths["data.corpus"] = map(len, read.corpus.blocks)
    if read.documents is not None:
        lengths["data.corpus"] = (config.data.corpus.block_size,)
    if config.eval.teacher:
        most = config.eval.max_new_tokens
        lengths |= {
            name: (_longest(example, most) for example in one.judged_by(judge).examples)
            for name, one in held_out.items()
        }
    return {name: max(found, default=0) for name, found in lengths.items()}


def _longest(example, answer: int) -> int:
    """Tokens of a prompt, as the teacher reads it, with its reference, its tasks, or an answer of so many."""
    texts = [one.read_by_teacher() for one in (example.sequence, *example.tasks.values())]
    return max(len(one.prompt) + max(len(one.response), answer) for one in texts)
