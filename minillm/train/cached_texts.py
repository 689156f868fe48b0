"""The check that a cached teacher has what a stage will ask it, before the first step; and what to say where it has not."""

import json
from collections.abc import Iterable, Iterator

from minillm import UserError
from minillm.config.loader.run_plan import Stage
from minillm.config.needs import Rows
from minillm.data.corpus import block_text
from minillm.data.fingerprints import template_fingerprint, tokenizer_fingerprint
from minillm.models.batch import TokenSequence
from minillm.teachers.cached import CachedTeacher
from minillm.teachers.several import members
from minillm.teachers.teacher import Teacher
from minillm.train.stage_data import StageData

UNMEASURED = (
    "a cached teacher reads no answers of the student: evaluations leave out reverse_kl_nats, sequence_reverse_kl_nats and "
    "forward_kl_nats (minillm eval measures them with a teacher that is there)"
)
NAMES: dict[Rows, str] = {"references": "prompts with their references", "corpus": "blocks of data.corpus"}
# Keys of data.prompts and data.corpus that say which records are taken, and not what is made of them.
SELECTION = {"limit", "skip", "path", "name", "split"}


def require_cached_texts(teacher: Teacher | None, stage: Stage, read: StageData) -> None:
    """Raises UserError, which says what is another, where a cached teacher lacks a text that it will be asked about.

    One process calls it. Every text is looked up; none of their rows is read.
    """
    for name, one in members(teacher).items():
        if isinstance(one, CachedTeacher):
            _require_texts(one, stage, read, judge=name)


def _require_texts(teacher: CachedTeacher, stage: Stage, read: StageData, *, judge: str | None) -> None:
    asked = {kind for term in stage.config.method.needs().terms if term.teacher for kind in term.rows}
    texts: dict[Rows, Iterable[TokenSequence]] = {}
    if "references" in asked:
        texts["references"] = (one.sequence for one in read.prompts.judged_by(judge).examples)
    if "corpus" in asked:
        texts["corpus"] = (block_text(block, place) for place, block in enumerate(read.corpus.blocks))
    for kind, found in texts.items():
        total, lacking, first = 0, 0, None
        for place, text in enumerate(found):
            total += 1
            if not teacher.holds(text):
                lacking, first = lacking + 1, place if first is None else first
        if lacking:
            reasons = list(_reasons(teacher, stage, read, kind)) or [
                "the records have changed since it was written; `minillm cache` on the same folder adds those that are new"
            ]
            raise UserError(
                f"stage {stage.name!r}: the cached teacher in {teacher.cache.folder} does not have {lacking:,} of {total:,} "
                f"{NAMES[kind]} (the first is number {first + 1:,}): {'; '.join(reasons)}"
            )


def _reasons(teacher: CachedTeacher, stage: Stage, read: StageData, kind: Rows) -> Iterator[str]:
    """The differences between the texts that the cache was written for and those that the stage reads."""
    described = teacher.cache.described
    if kind not in described["texts"]:
        yield f"it was written for {', '.join(described['texts'])} (method.texts of the stage that wrote it)"
        return
    if described["tokenizer"] != tokenizer_fingerprint(read.tokenizer):
        yield "its tokenizer is another one than the student's"
    group = "corpus" if kind == "corpus" else "prompts"
    now = getattr(stage.config.data, group).model_dump(mode="json")
    before = described["data"].get(group) or {}
    if now.get("template") == "chat" and described["template"] != template_fingerprint(read.tokenizer):
        yield "its tokenizer's chat template is another one than the student's"
    for key in sorted({*now, *before} - SELECTION):
        if now.get(key) != before.get(key):
            yield f"data.{group}.{key} was {json.dumps(before.get(key))}, and is {json.dumps(now.get(key))}"
    if group == "prompts" and "strftime_now" in str(read.tokenizer.chat_template):
        yield "the chat template prints the date, so that its texts are those of the day they were written on"
