"""The check that the servers of a teacher read texts as long as those of a stage, before the first step."""

from collections.abc import Iterable, Mapping

from minillm.config.loader.run_plan import Stage
from minillm.data.instructions import PromptSet
from minillm.teachers.remote import RemoteTeacher
from minillm.train.stage_data import StageData


def require_served_lengths(
    teacher: RemoteTeacher, stage: Stage, read: StageData, held_out: Mapping[str, PromptSet]
) -> None:
    """Raises UserError for data with texts, or with prompts that can be answered, beyond what the servers read."""
    config, needs = stage.config, stage.config.method.needs()
    answer = config.rollout.max_new_tokens if needs.samples else 0
    lengths: dict[str, Iterable[int]] = {
        name: (_longest(example, answer) for example in one.examples)
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
        lengths |= {name: (_longest(example, most) for example in one.examples) for name, one in held_out.items()}
    for name, found in lengths.items():
        teacher.require_length(name, max(found, default=0))


def _longest(example, answer: int) -> int:
    """Tokens of a prompt, as the teacher reads it, with its reference, its tasks, or an answer of so many."""
    texts = [one.read_by_teacher() for one in (example.sequence, *example.tasks.values())]
    return max(len(one.prompt) + max(len(one.response), answer) for one in texts)
