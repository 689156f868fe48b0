"""The conditions that a pair of models must meet before anything is trained, and the table that shows it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm import UserError
from minillm.models.access import OUT_OF_MEMORY, failed_run, head_error, lm_head, padding_error
from minillm.models.families import answer_beside_pictures, placeholder_id, sees_pictures
from minillm.models.loading import is_hollow
from minillm.models.other_device import elsewhere
from minillm.models.processors import placeholder_ids, processor_of
from minillm.models.quantization import element_count, is_quantized, quantization_name
from minillm.models.sharded import is_sharded
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.models.tokenizers import end_ids
from minillm.teachers.cached import CachedTeacher
from minillm.teachers.in_turn import TeacherInTurn
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from minillm.teachers.remote import RemoteTeacher
from minillm.teachers.several import SeveralTeachers
from minillm.teachers.teacher import Teacher
from minillm.teachers.vocabularies import PreflightError, SharedVocabulary, shared_vocabulary

Row = tuple[str, str, str]  # (what, student, teacher)
Tokenizers = (
    PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase]
)  # of one teacher, or of several by their names


class Judge(NamedTuple):
    """One of the teachers of a student, in most pairs the only one."""

    who: str  # for errors
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase | None


def preflight(
    student: PreTrainedModel,
    teacher: Teacher | None,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: Tokenizers | None,
    device: torch.device,
    *,
    by_layers: bool = False,
    tokenizers: TokenizerPair | None = None,
) -> tuple[Models, list[Row]]:
    """The pair as `Models`, and the rows of the preflight table.

    Vocabularies padded to different sizes, or of which one has tokens that were added to the other, are cut to the shared
    part. What ends an answer for either model ends it for
    both: the student's generation configuration is made to say so. Raises PreflightError for different tokenizers, for
    a tokenizer with ids of ordinary text beyond a head, for one without an end of text, and for an architecture that does something to
    its logits that the losses would not see.

    With `tokenizers` each of the two reads its own ids, of which nothing is cut, and the student's ends are its own.
    """
    judges = _judges(teacher, teacher_tokenizer)
    rows_s = lm_head(student).weight.shape[0]
    if tokenizers is None:
        vocabulary = _shared_by_all(student_tokenizer, judges, rows_s)
    else:
        vocabulary = shared_vocabulary(student_tokenizer, None, rows=[rows_s])
        shared_vocabulary(teacher_tokenizer, None, rows=[teacher.vocab_size])
    vocab_size = vocabulary.size
    for judge in judges:
        largest = judge.teacher.largest_id if isinstance(judge.teacher, CachedTeacher) else None
        if largest is not None and largest >= vocab_size:
            raise PreflightError(
                f"the cached teacher's likeliest ids go up to {largest:,}, and student and teacher share only "
                f"{vocab_size:,}; cache hidden states (method.rows=hidden), whose head is cut to the shared part"
            )
    _look_at_pictures(student, student_tokenizer, judges)
    for who, model in (("student", student), *((judge.who, judge.teacher.model) for judge in judges)):
        # one that is sharded over the ranks was looked at when it was loaded; one without weights is rank 0's to look at
        if model is not None and not is_sharded(model) and not is_hollow(model):
            check_model(who, model)
    ends = [*end_ids(student, student_tokenizer)]
    for _, one, tokenizer in judges if tokenizers is None else ():
        ends += one.end_ids if one.model is None else end_ids(one.model, tokenizer or student_tokenizer)
    eos_ids = tuple(dict.fromkeys(token for token in ends if token < vocab_size))
    if not eos_ids:
        raise PreflightError(
            "neither a tokenizer nor a generation configuration names an EOS token, so no answer could end; set eos_token "
            "in the tokenizer"
        )
    student.generation_config.eos_token_id = list(eos_ids)
    pad_id = student_tokenizer.pad_token_id
    models = Models(
        student,
        teacher,
        student_tokenizer,
        vocab_size,
        eos_ids,
        eos_ids[0] if pad_id is None or pad_id >= vocab_size else pad_id,
        device,
        by_layers,
        vocabulary,
        tokenizers,
    )
    for judge in judges:
        if isinstance(judge.teacher, RemoteTeacher):
            judge.teacher.shared_ids = vocab_size if tokenizers is None else judge.teacher.vocab_size
        elif isinstance(judge.teacher, LocalTeacher | TeacherInTurn):
            judge.teacher.give_to(device)
    return models, _table(models, judges, rows_s)


def _judges(teacher: Teacher | None, tokenizer: Tokenizers | None) -> list[Judge]:
    if isinstance(teacher, SeveralTeachers):
        return [Judge(f"teacher {name!r}", one, tokenizer[name]) for name, one in teacher.teachers.items()]
    return [] if teacher is None else [Judge("teacher", teacher, tokenizer)]


def _shared_by_all(tokenizer: PreTrainedTokenizerBase, judges: Sequence[Judge], rows_s: int) -> SharedVocabulary:
    """The ids that the student and all teachers share. Raises PreflightError, which of several names the one that does not."""
    rows, found = [rows_s, *(judge.teacher.vocab_size for judge in judges)], []
    for who, _, theirs in judges:
        try:
            found.append(shared_vocabulary(tokenizer, theirs, rows=rows))
        except PreflightError as error:
            raise error if len(judges) == 1 else PreflightError(f"{who}: {error}") from None
    if not found:
        return shared_vocabulary(tokenizer, None, rows=rows)
    unshared = {index: names for one in found for index, names in one.unshared.items()}
    return SharedVocabulary(min(one.size for one in found), unshared)


def _look_at_pictures(
    student: PreTrainedModel, student_tokenizer: PreTrainedTokenizerBase, judges: Sequence[Judge]
) -> None:
    """Ban what stands for a picture from the answers of models all of which pictures can be shown to, and of no others."""
    pairs = [("student", student, student_tokenizer)]
    pairs += [(who, teacher.model, tokenizer) for who, teacher, tokenizer in judges]
    for who, model, tokenizer in pairs:
        processor = None if tokenizer is None else processor_of(tokenizer)
        if model is None or processor is None or not sees_pictures(model):
            continue
        if placeholder_id(model.config) not in placeholder_ids(processor):
            raise PreflightError(
                f"{who}: a picture stands in prompts as id {min(placeholder_ids(processor))} by the tokenizer's processor, and as "
                f"{placeholder_id(model.config)} by the model's configuration; use the tokenizer the model was trained with"
            )
    seeing = [
        model is not None and sees_pictures(model) and processor_of(tokenizer) is not None
        for _, model, tokenizer in pairs
    ]
    ids = {placeholder_id(model.config) for _, model, _ in pairs if model is not None}
    for place, (_, teacher, _) in enumerate(judges, start=1):
        if teacher.model is None:
            seeing[place], ids = teacher.picture_id is not None, {*ids, teacher.picture_id}
    beside = all(seeing) and len(ids) == 1
    for _, model, _ in pairs:
        if model is not None:
            answer_beside_pictures(model, beside)
    for _, teacher, _ in judges:
        if isinstance(teacher, CachedTeacher | TeacherInTurn):
            teacher.answers_beside_pictures = beside


def check_model(who: str, model: PreTrainedModel) -> None:
    """Raises PreflightError for a model whose logits its head and its last hidden states do not say, and for one that reads
    the padding of a batch. `who` says whose it is."""
    name = type(model).__name__
    try:
        head, padding = head_error(model), padding_error(model)
    except (UserError, *OUT_OF_MEMORY):
        raise
    except Exception as error:  # whatever the code of an architecture raises
        raise PreflightError(f"{who}: {name} cannot be run on a few tokens {failed_run(model, error)}") from error
    exact = model.dtype in (torch.float32, torch.float64)
    if not head <= (1e-4 if exact else 0.05):
        raise PreflightError(
            f"{who}: the logits of {name} differ from its LM head on its last hidden states by {head:.1%}, "
            "so a loss on those would be of another model. Either a weight is not finite, or the architecture does "
            "something to its logits that minillm does not know; choose another model"
        )
    # in 16 bits rounding can send a token to other experts
    if not padding <= (1e-3 if exact and not is_quantized(model) else 0.2):
        raise PreflightError(
            f"{who}: {name} computes something else for a text beside a longer one than for the text alone (by "
            f"{padding:.1%}): it reads the padding of a batch as text; choose another model"
        )


def of_all(whose: Sequence[str], cells: Sequence[str]) -> str:
    """The cells of all teachers in one: what is the same for all is said once."""
    if len(set(cells)) == 1:
        return cells[0]
    return "; ".join(f"{name}: {cell}" for name, cell in zip(whose, cells, strict=True))


def _counts(model: PreTrainedModel) -> str:
    """The number of weights, and how many of them are trained where that is neither all nor none."""
    sizes = [(getattr(one, "ds_numel", element_count(one)), one.requires_grad) for one in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, graded in sizes if graded)
    return f"{trained:,} trained of {total:,}" if 0 < trained < total else f"{total:,}"


def _precision(model: PreTrainedModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{dtype} around {quantization_name(model)}" if is_quantized(model) else dtype


def _table(models: Models, judges: Sequence[Judge], rows_s: int) -> list[Row]:
    student_template = models.tokenizer.chat_template

    def template_of(tokenizer) -> str:
        template = getattr(tokenizer, "chat_template", None)
        if tokenizer is models.tokenizer:
            return "none" if template is None else "there"
        return "the same" if template == student_template else "none" if template is None else "another one"

    def pictures_of(model, tokenizer) -> str:
        processor = None if tokenizer is None else processor_of(tokenizer)
        seen = processor is not None and sees_pictures(model)
        return type(processor.image_processor).__name__ if seen else "none"

    def column(model, tokenizer, rows, teacher=None):
        cut = "" if models.tokenizers or rows == models.vocab_size else f", cut to {models.vocab_size:,}"
        if model is None:
            heads = f"{rows:,}" + cut
            ends = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in teacher.end_ids)
            name, size, form = teacher.summary
            return [name, size, form, heads, f"{len(tokenizer):,} tokens", ends, template_of(tokenizer), "none"]
        config = model.config
        return [
            type(model).__name__,
            _counts(model),
            f"{_precision(model)}, {config._attn_implementation}"
            + ("" if model._supports_sdpa else " (it has no sdpa)"),
            f"{rows:,}" + cut,
            f"{len(tokenizer):,} tokens" if tokenizer is not None else "-",
            ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in end_ids(model, tokenizer))
            if tokenizer
            else "-",
            template_of(tokenizer),
            pictures_of(model, tokenizer),
        ]

    def device_of(model) -> str:
        return "-" if model is None else str(model.device)

    names = [
        "model",
        "parameters",
        "dtype, attention",
        "head rows",
        "tokenizer",
        "end of answer",
        "chat template",
        "pictures",
    ]
    beside = [column(one.model, tokenizer, one.vocab_size, one) for _, one, tokenizer in judges]
    whose = list(models.teacher.teachers) if isinstance(models.teacher, SeveralTeachers) else [""]
    columns = (
        column(models.student, models.tokenizer, rows_s),
        [of_all(whose, cells) for cells in zip(*beside, strict=True)] or ["-"] * len(names),
    )
    table = [(name, ours, theirs) for name, ours, theirs in zip(names, *columns, strict=True)]
    if any(one.teacher.model is not None and elsewhere(one.teacher.model, models.device) for one in judges):
        cells = [device_of(one.teacher.model) for one in judges]
        table.append(("device", device_of(models.student), of_all(whose, cells)))
    pad = models.tokenizer.convert_ids_to_tokens(models.pad_id)
    if (unshared := models.vocabulary.described()) is not None:
        table.append(("ids not shared", *unshared))
    table.append(("padding", f"{pad!r}" + (", also an EOS" if models.pad_id in models.eos_ids else ""), "-"))
    return table
