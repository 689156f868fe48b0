"""The data of a stage, read and looked at before any model is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from minillm import UserError
from minillm.config.data import RecordKeys
from minillm.config.loader.run_plan import Stage
from minillm.config.models import named_teacher
from minillm.config.paths import STAGE
from minillm.data.corpus import Corpus, load_corpus
from minillm.data.documents import Documents, survey_documents
from minillm.data.instructions import PromptSet, load_prompts, require_shared_pictures
from minillm.data.judges import judges_of
from minillm.data.pairs import PairSet, load_pairs
from minillm.data.tokenization import require_end
from minillm.distributed import collectives
from minillm.engine.placement import check_backend, engine_device
from minillm.models.locations import resolve_path
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.models.tokenizers import load_tokenizer
from minillm.teachers.open import teacher_tokenizers
from minillm.teachers.pair import Models
from minillm.teachers.preflight import Row
from minillm.teachers.vocabularies import PreflightError, require_same_tokenizer

Keys = TypeVar("Keys")
ALIGNED = 256  # references whose tokens are aligned for the preflight table


@dataclass(frozen=True)
class StageData:
    """The data that a stage reads before any model: its material, and the rows of the preflight table that tell of it."""

    tokenizer: PreTrainedTokenizerBase  # of the model on the student's side
    teacher_tokenizers: dict[str, PreTrainedTokenizerBase]  # by the keys of the teachers: one, several or none
    prompts: PromptSet | None
    corpus: Corpus | None
    rows: list[Row]
    pairs: PairSet | None = None
    documents: Documents | None = None  # in the place of the corpus, where the method reads it whole
    forget: PromptSet | None = None
    tokenizers: TokenizerPair | None = None  # where the teacher reads its own ids


def read_stage_data(stage: Stage, output_dir: Path, started: datetime, *, saved: Path | None = None) -> StageData:
    """Tokenizers and data, before any model: what is wrong with them is said first.

    Args:
        started: when the run was, which chat templates take for the time.
        saved: the run's own copy of the student that the stage goes on with.
    """
    config, needs = stage.config, stage.config.method.needs()
    check_backend(config.engine, engine_device(config.engine))
    side = config.student_side
    tokenizer = load_tokenizer(side if saved is None else side.saved_in(saved), output_dir)
    theirs = teacher_tokenizers(config.teacher_side, output_dir)
    pair = TokenizerPair(tokenizer, theirs["teacher"]) if theirs and needs.other_tokenizer else None
    if pair is None:
        _require_one_tokenizer(tokenizer, theirs, needs.reference)
    judges = judges_of(config.teacher_side) if needs.teacher else None
    prompts = pairs = corpus = documents = forget = None
    rows = []
    if config.teachers:
        rows.append(("teachers", "-", named_teacher(config.teacher_side)))
    if needs.prompts:
        source = _with_stage_files(config.data.prompts, output_dir)
        if not needs.reads_context and isinstance(source, RecordKeys):  # of a file that stages share
            source = source.model_copy(update={"teacher_context": None})
        prompts = load_prompts(
            source,
            tokenizer,
            tasks=needs.tasks,
            few_shot=needs.few_shot,
            written=needs.written,
            teacher=None if pair is None else theirs["teacher"],
            judges=judges,
            now=started,
        )
        rows.append(("prompts", f"{len(prompts)} used, {prompts.dropped_long} too long", prompts.source))
        if prompts.told:
            longest = max(len(ids) for ids in prompts.teacher_ids())
            rows.append(("teacher's context", f"in {prompts.told} prompts", f"up to {longest} tokens with it"))
        if judges is not None:
            counts = Counter(example.judge for example in prompts)
            rows.append(
                ("records by teacher", ", ".join(f"{counts[name]} {name}" for name in judges.names), judges.field)
            )
        if prompts.typed:
            rows.append(("special tokens", f"text in {prompts.typed} prompts that spell them", prompts.source))
    if needs.references:
        _require_references(stage, prompts, "data.prompts")
    if pair is not None and prompts is not None:
        answers = [(one.response_ids, one.other.answer_ids) for one in prompts.examples[:ALIGNED] if one.response_ids]
        rows += pair.rows(answers)
    if needs.pairs:
        pairs = load_pairs(_with_stage_files(config.data.pairs, output_dir), tokenizer, now=started)
        used = f"{len(pairs)} used, {pairs.dropped_long} too long, {pairs.dropped_alike} of answers that are alike"
        rows.append(("pairs", used, pairs.source))
        if pairs.typed:
            rows.append(("special tokens", f"text in {pairs.typed} pairs that spell them", pairs.source))
    if needs.forget:
        forget = load_prompts(
            _with_stage_files(config.data.forget, output_dir), tokenizer, name="data.forget", now=started
        )
        rows.append(("to forget", f"{len(forget)} used, {forget.dropped_long} too long", forget.source))
        _require_references(stage, forget, "data.forget")
    sources = {"data.prompts": prompts, "data.forget": forget, "data.pairs": pairs}
    read = {name: one for name, one in sources.items() if one is not None}
    require_shared_pictures(read, tokenizer, theirs.values(), ranks=collectives.world_size())
    if needs.images:
        _require_pictures(stage, prompts, pairs)
    if "student" in needs.trains and not side.trained_by_text:
        _require_pictures(stage, prompts, pairs, use="trains what pictures alone pass through (student.train)")
    if needs.whole_documents:
        require_end(tokenizer, "data.corpus")
        documents = survey_documents(_with_stage_files(config.data.corpus, output_dir))
        rows.append(("corpus", f"{len(documents)} documents", "read whole"))
    elif config.data.corpus is not None:
        corpus = load_corpus(_with_stage_files(config.data.corpus, output_dir), tokenizer)
        rows.append(("corpus", f"{len(corpus.blocks)} blocks", f"{corpus.documents} documents"))
    return StageData(tokenizer, theirs, prompts, corpus, rows, pairs, documents, forget, pair)


def _require_one_tokenizer(
    student: PreTrainedTokenizerBase, teachers: Mapping[str, PreTrainedTokenizerBase], reference: str | None
) -> None:
    """Raises PreflightError, which of several teachers names the one whose tokenizer is another than the student's."""
    for key, tokenizer in teachers.items():
        try:
            require_same_tokenizer(student, tokenizer, reference=reference)
        except PreflightError as error:
            raise error if len(teachers) == 1 else PreflightError(f"{key}: {error}") from None


def require_shared_ids(models: Models, read: StageData, held_out: Mapping[str, PromptSet]) -> None:
    """Raises UserError for texts with ids that student and teacher do not share."""
    sets = {"data.prompts": read.prompts, "data.forget": read.forget, "data.pairs": read.pairs, **held_out}
    for name, one in sets.items():
        if one is not None:
            models.require_shared(name, one.ids())
    if read.corpus is not None:
        models.require_shared("data.corpus", read.corpus.blocks)


def _require_references(stage: Stage, prompts: PromptSet, name: str) -> None:
    misplaced = [example.misplaced for example in prompts.examples if example.misplaced is not None]
    if misplaced:
        raise UserError(
            f"stage {stage.name!r}: method {stage.config.method.name} imitates the references, and {len(misplaced)} of "
            f"{len(prompts)} stand where the model would not write them: {misplaced[0]}"
        )
    bare = [example.index for example in prompts if not example.response_ids]
    remedy = "give them an answer, or use a method that samples its answers"
    _require_none(stage, name, bare, len(prompts), "imitates the references", remedy)


def _require_pictures(
    stage: Stage, prompts: PromptSet | None, pairs: PairSet | None = None, *, use: str = "reads the pictures of prompts"
) -> None:
    bare = {"data.prompts": [one.index for one in prompts or () if not one.extras],
            "data.pairs": [one.key for one in pairs or () if not one.chosen.extras]}  # fmt: skip
    for name, texts in (("data.prompts", prompts), ("data.pairs", pairs)):
        _require_none(stage, name, bare[name], len(texts or ()), use, "give them one")


def _require_none(stage: Stage, name: str, bare: Sequence[int], total: int, use: str, remedy: str) -> None:
    """Raises UserError where there are prompts, by their places in the data, that lack what the method needs."""
    if bare:
        raise UserError(
            f"stage {stage.name!r}: method {stage.config.method.name} {use}, but {len(bare)} of {total} prompts of "
            f"{name} have none (the first is number {bare[0] + 1}); {remedy}"
        )


def _with_stage_files(config: Keys, output_dir: Path) -> Keys:
    """Data keys whose path is not stage:NAME but the files that the stage has left."""
    path = getattr(config, "path", "")
    if not path.startswith(STAGE):
        return config
    return config.model_copy(update={"path": str(resolve_path(path, output_dir) / "*.jsonl*")})
