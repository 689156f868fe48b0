"""Opening a student and a teacher as a pair: for a stage, an evaluation, a conversation and an experiment alike."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from minillm import UserError
from minillm.config.models import (
    AnyTeacherConfig,
    CachedTeacherConfig,
    ServedTeacherConfig,
    SeveralTeachersConfig,
    StudentConfig,
    TeacherConfig,
    TeacherSide,
    teachers_of,
)
from minillm.config.training import Packing
from minillm.distributed import collectives
from minillm.models.delta import Delta, Translation
from minillm.models.device import pick_device
from minillm.models.loading import load_student, load_teacher
from minillm.models.other_device import elsewhere
from minillm.models.sharded import gathered
from minillm.models.spelling import spelling_of
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.models.tokenizers import load_tokenizer
from minillm.models.vocabulary_map import kept_map
from minillm.teachers.cached import CachedTeacher
from minillm.teachers.in_turn import TeacherInTurn, Turn
from minillm.teachers.local import LocalTeacher
from minillm.teachers.openai_teacher import OpenAITeacher
from minillm.teachers.packed_pair import settle_packing
from minillm.teachers.pair import Models
from minillm.teachers.preflight import Row, check_model, preflight
from minillm.teachers.row_cache import TOKENIZER, find_cache
from minillm.teachers.served import ServedTeacher, fetch_tokenizer
from minillm.teachers.several import SeveralTeachers, weights_here
from minillm.teachers.teacher import Teacher, require_ability
from minillm.teachers.vocabularies import PreflightError, require_same_tokenizer


class OpenTeacher(NamedTuple):
    """A teacher and what its texts are made of."""

    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase | dict[str, PreTrainedTokenizerBase]  # of several teachers by their names


def teacher_tokenizers(config: TeacherSide | None, output_dir: Path) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers of the teachers that there are, by the key of each. Raises UserError where one cannot be read."""
    return {key: teacher_tokenizer(one, output_dir) for key, one in teachers_of(config).items()}


def teacher_tokenizer(config: AnyTeacherConfig, output_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher; a cache has the one of whom it was written by, and servers of minillm send theirs.

    Raises UserError where it cannot be read.
    """
    if isinstance(config, ServedTeacherConfig) and config.protocol == "openai":
        own = TeacherConfig(path=config.tokenizer or config.model, tokenizer=config.tokenizer)
        return load_tokenizer(own, output_dir)
    if isinstance(config, ServedTeacherConfig):
        with tempfile.TemporaryDirectory() as folder:
            fetch_tokenizer(config, Path(folder))
            return load_tokenizer(TeacherConfig(path=folder, tokenizer=folder), output_dir)
    if isinstance(config, CachedTeacherConfig):
        folder = find_cache(config.path, output_dir) / TOKENIZER
        return load_tokenizer(TeacherConfig(path=str(folder), tokenizer=str(folder)), output_dir)
    return load_tokenizer(config, output_dir)


def open_teacher(
    config: TeacherSide, *, output_dir: Path, device: torch.device, sharded: bool = False, key: str = "teacher"
) -> OpenTeacher:
    """The teacher of a configuration. All ranks call it together; of one that will be sharded, rank 0 reads the weights.

    Args:
        output_dir: where models of stage:NAME lie.
        device: of a teacher that does not name one.
        sharded: it will be sharded over the ranks.
        key: the key of its group, for errors.

    Of a cached or a served one no weights are read before its head is asked for. Raises UserError where it cannot be read.
    """
    if isinstance(config, SeveralTeachersConfig):
        turn = Turn() if config.by.in_memory == "one" else None
        opened = {
            name: _open_in_turn(name, one, turn, output_dir, device)
            if turn is not None and isinstance(one, TeacherConfig)
            else open_teacher(one, output_dir=output_dir, device=device, sharded=sharded, key=f"teachers.{name}")
            for name, one in config.teachers.items()
        }
        several = SeveralTeachers({name: one.teacher for name, one in opened.items()}, config.weights, config.abilities)
        return OpenTeacher(several, {name: one.tokenizer for name, one in opened.items()})
    if isinstance(config, ServedTeacherConfig):
        if config.protocol == "openai":
            tokenizer = teacher_tokenizer(config, output_dir)
            return OpenTeacher(collectives.together(lambda: OpenAITeacher(config, device, tokenizer)), tokenizer)
        served = collectives.together(lambda: ServedTeacher(config, device))
        return OpenTeacher(served, teacher_tokenizer(config, output_dir))
    if isinstance(config, CachedTeacherConfig):
        cached = collectives.together(lambda: CachedTeacher(find_cache(config.path, output_dir), device))
        return OpenTeacher(cached, teacher_tokenizer(config, output_dir))
    hollow = sharded and collectives.rank() > 0
    where = _device_of(config, key, device)
    model = collectives.together(lambda: load_teacher(config, output_dir=output_dir, device=where, hollow=hollow))
    return OpenTeacher(LocalTeacher(model), load_tokenizer(config, output_dir))


def _device_of(config: TeacherConfig, key: str, device: torch.device) -> torch.device:
    return device if config.device is None else pick_device(config.device, f"{key}.device")


def _open_in_turn(name: str, config: TeacherConfig, turn: Turn, output_dir: Path, device: torch.device) -> OpenTeacher:
    """One of several teachers that are in memory one at a time, whole on every rank."""
    tokenizer = load_tokenizer(config, output_dir)
    where = _device_of(config, f"teachers.{name}", device)
    teacher = collectives.together(
        lambda: TeacherInTurn(
            lambda: load_teacher(config, output_dir=output_dir, device=where),
            tokenizer,
            turn,
            look=lambda model: check_model(f"teacher {name!r}", model),
        )
    )
    return OpenTeacher(teacher, tokenizer)


def open_models(
    student: StudentConfig | None,
    teacher: OpenTeacher | None,
    *,
    output_dir: Path,
    device: torch.device,
    loading_device: torch.device | None = None,
    seed: int = 0,
    trained: bool = False,
    copy_teacher: bool = False,
    saved: Path | None = None,
    hollow: bool = False,
    by_layers: bool = False,
    tokenizers: TokenizerPair | None = None,
    packing: Packing = "auto",
) -> tuple[Models, list[Row]]:
    """A pair, looked over before anything is done with it, and the rows of its preflight table.

    All ranks call it together.

    Args:
        student: its configuration; None for the teacher in both places.
        teacher: from `open_teacher`, or None where there is none.
        output_dir: where models of stage:NAME lie.
        device: where the pair will be.
        loading_device: where the student is read to, if that is another place.
        seed: of fresh weights and adapters.
        trained: the student keeps the weights that require a gradient; otherwise nothing of it is trained.
        copy_teacher: the student starts from the very weights of the teacher, which are copied and not read again.
        saved: a folder with the student's weights and tokenizer, wherever its configuration had them from.
        hollow: the student's weights come from rank 0 later (minillm.models.loading.is_hollow).
        by_layers: sharded weights are gathered a layer at a time.
        tokenizers: of both, where each is to read its own ids.
        packing: as train.packing.

    Raises PreflightError where the two do not go together, or one cannot read batches packed, UserError where one cannot be
    read.
    """
    judge, judges_tokenizer = (None, None) if teacher is None else teacher
    if student is None:
        require_ability(judge, "evaluate", "a teacher in the student's place")
        where = elsewhere(judge.model, device) or device  # the only model is where it says
        models, rows = preflight(judge.model, judge, judges_tokenizer, judges_tokenizer, where)
        return models, [*rows, settle_packing(models, packing)]
    options = {"output_dir": output_dir, "device": loading_device or device, "seed": seed, "hollow": hollow}
    source = judge.model if copy_teacher else None
    model = collectives.together(lambda: load_student(student, source=source, saved=saved, **options))
    if not trained:
        model = model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(student if saved is None else student.saved_in(saved), output_dir)
    with gathered(*weights_here(judge), by_layers=by_layers):  # an earlier stage may have sharded it
        models, rows = collectives.together(
            lambda: preflight(
                model, judge, tokenizer, judges_tokenizer, device, by_layers=by_layers, tokenizers=tokenizers
            )
        )
        return models, [*rows, settle_packing(models, packing)]


def open_named(
    path: str | None,
    teacher: TeacherSide | None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    tokenizer: str | None = None,
    output_dir: Path = Path("."),
) -> tuple[Models, list[Row]]:
    """A pair to answer and to be measured, as the command line names it, and the rows of its preflight table.

    Args:
        path: what minillm.models.open.model_path returned; None for the teacher in both places.
        device: as engine.device.
        dtype: of the student's weights.
        tokenizer: of the student, default its own.
        output_dir: where a teacher of stage:NAME lies.

    Raises PreflightError where the two do not go together, UserError where there is no such device.
    """
    where = pick_device(device)
    transformers.utils.logging.disable_progress_bar()
    opened = None if teacher is None else open_teacher(teacher, output_dir=output_dir, device=where)
    student = None if path is None else StudentConfig(path=path, dtype=dtype, tokenizer=tokenizer)
    return open_models(student, opened, output_dir=output_dir, device=where)


def with_delta(models: Models, path: str, *, alpha: float = 1.0, dtype: str = "float32") -> Models:
    """The models with a delta, whose logits are added to the student's times alpha.

    A delta with another tokenizer comes with a map of the student's ids to its own, which is kept beside it.

    Args:
        path: what minillm.models.open.model_path returned.
        dtype: of the delta's weights.

    Raises UserError for an alpha that is not above 0, PreflightError for a delta that could not be read.
    """
    if not alpha > 0 or alpha == float("inf"):
        raise UserError(f"--alpha is {alpha}; it must be a number above 0 (without --delta the model answers alone)")
    config = StudentConfig(path=path, dtype=dtype)
    opened, _ = open_models(config, None, output_dir=Path("."), device=models.device)
    tokenizer = opened.tokenizer
    translation = None
    if not _same_ids(models, opened):
        beside = Path(path)
        made = kept_map(spelling_of(models.tokenizer), spelling_of(tokenizer), beside if beside.is_dir() else None)
        translation = Translation(models.tokenizer, made)
    return replace(models, delta=Delta(opened.student, tokenizer, models.vocab_size, alpha, translation))


def _same_ids(models: Models, delta: Models) -> bool:
    """True where a delta can be fed the ids of the model that it controls."""
    try:
        unshared = require_same_tokenizer(models.tokenizer, delta.tokenizer)
    except PreflightError:
        return False
    return not unshared and delta.vocab_size >= models.vocab_size
