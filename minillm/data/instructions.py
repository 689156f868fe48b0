"""Prompts with their references, from records of any known form, tokenised once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.config.analysis_keys import Labels
from minillm.config.data import (
    InstructionKeys,
    Pairs,
    Parser,
    PlainPrompts,
    Prompts,
    QuestionKeys,
    RecordKeys,
    TaskKeys,
    TemplateKeys,
)
from minillm.config.few_shot import FewShot, Part
from minillm.data.answer_parsers import parse_answer
from minillm.data.arithmetic import arithmetic_records
from minillm.data.easy_vqa import easy_vqa_records
from minillm.data.fields import fill, fill_question
from minillm.data.images import find_pictures
from minillm.data.judges import Judges
from minillm.data.other_reading import OtherReading, read_plain_otherwise
from minillm.data.prompt_reader import PromptReader
from minillm.data.pydoc import pydoc_records
from minillm.data.record_tasks import RecordTasks
from minillm.data.records import Conversation, parse
from minillm.data.sources import DataError, Record, read_hf, read_jsonl, read_parquet, read_texts
from minillm.data.special_text import special_tokens_of
from minillm.data.teacher_context import TeacherReader
from minillm.data.tokenization import encode, require_end
from minillm.models.batch import TokenSequence
from minillm.models.processors import unshared_pictures


@dataclass(frozen=True)
class Example:
    """One prompt."""

    index: int  # its place in the source: stable whatever is dropped, and the key of its sampling noise
    prompt_ids: list[int]
    response_ids: list[int]  # the first reference and its end, cut at max_response_length; empty without a reference
    prompt: str
    references: tuple[str, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # as TokenSequence has them
    misplaced: str | None = None  # why nobody may be trained on the reference, where the template puts it elsewhere
    typed: bool = False  # it spells special tokens, which are text in it
    tasks: Mapping[str, TokenSequence] = field(default_factory=dict)  # by name; a response is empty where there is none
    asked: TokenSequence | None = None  # the few-shot prompt to the teacher, without a response
    maker: RecordTasks | None = None  # makes the tasks anew of what the teacher has written
    other: OtherReading | None = None  # by a teacher with another tokenizer
    teacher_prompt: str | None = None  # with the context that it alone reads; None where there is none
    teacher_prompt_ids: list[int] | None = None  # of that, where the tokenizer is the student's
    judge: str | None = None  # the name of its teacher, as TokenSequence has it

    @property
    def sequence(self) -> TokenSequence:
        """The prompt with its first reference."""
        return self.answered(self.response_ids)

    def prompt_for(self, who: Literal["student", "teacher"]) -> list[int]:
        """The prompt as one of the two reads it."""
        if who == "teacher" and self.teacher_prompt_ids is not None:
            return self.teacher_prompt_ids
        return self.prompt_ids

    def answered(self, response: list[int]) -> TokenSequence:
        """The prompt with another response in the place of the reference."""
        of_teacher = {"teacher_prompt": self.teacher_prompt_ids, "judge": self.judge}
        return TokenSequence(self.prompt_ids, response, self.index, self.extras, **of_teacher)


class TextSet(Protocol):
    """Texts that models read, some of which may show pictures."""

    @property
    def pictured(self) -> int:
        """The number of those that do."""

    def ids(self) -> Iterator[list[int]]:
        """The ids of all of them."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class PromptSet(Sequence[Example]):
    """The usable prompts of a source."""

    examples: list[Example]
    dropped_long: int  # prompts over max_prompt_length, or max_characters
    source: str
    parser: Parser | None = None  # finds the label in a reference

    @property
    def pictured(self) -> int:
        """Prompts that show pictures."""
        return sum(len(example.extras) > 0 for example in self.examples)

    @property
    def typed(self) -> int:
        """Prompts that spell special tokens, which are text in them."""
        return sum(example.typed for example in self.examples)

    @property
    def told(self) -> int:
        """Prompts with a context that the teacher alone reads."""
        return sum(example.teacher_prompt is not None for example in self.examples)

    def judged_by(self, teacher: str | None) -> "PromptSet":
        """The prompts that a teacher reads: where records name theirs, the part that names it, and else all of them."""
        return replace(self, examples=[example for example in self.examples if example.judge in (None, teacher)])

    def teacher_ids(self) -> Iterator[list[int]]:
        """The ids of the prompts as the teacher reads them."""
        for example in self.examples:
            yield example.prompt_for("teacher") if example.other is None else example.other.ids

    def ids(self) -> Iterator[list[int]]:
        """The ids of all prompts and references."""
        for example in self.examples:
            yield example.prompt_ids
            yield example.response_ids
            for task in example.tasks.values():
                yield task.prompt
                yield task.response
            if example.asked is not None:
                yield example.asked.prompt
            if example.teacher_prompt_ids is not None:
                yield example.teacher_prompt_ids

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def require_shared_pictures(
    sets: Mapping[str, TextSet],
    student: PreTrainedTokenizerBase,
    teachers: Iterable[PreTrainedTokenizerBase],
    *,
    ranks: int = 1,
) -> None:
    """Raises DataError where pictures would reach student and teacher as different ones, or the teacher not at all; and
    where several ranks would not all run the part of a model that looks at them.

    Args:
        sets: by the names that errors call them.
        student: the tokenizer that the sets were read with.
        teachers: the tokenizers of all teachers.
    """
    pictured = {name: prompts for name, prompts in sets.items() if prompts.pictured}
    reasons = [unshared_pictures(student, teacher) for teacher in teachers]
    unshared = next((reason for reason in reasons if reason is not None), None)
    for name, prompts in pictured.items():
        if unshared is not None:
            raise DataError(f"{name}: its prompts show pictures, and {unshared}")
        if ranks > 1 and prompts.pictured < len(prompts):
            raise DataError(
                f"{name}: {prompts.pictured} of {len(prompts)} prompts show pictures; on several ranks all must, or none, since "
                "every rank runs the same layers at the same time. Put them into two stages, or two sets"
            )


def load_prompts(
    config: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "data.prompts",
    tasks: Mapping[str, TaskKeys] = MappingProxyType({}),
    few_shot: FewShot | None = None,
    written: Sequence[Part] = (),
    teacher: PreTrainedTokenizerBase | None = None,
    judges: Judges | None = None,
    now: datetime | None = None,
) -> PromptSet:
    """Read, render and tokenise.

    Args:
        name: of the set, for errors.
        tasks: made of every record beside its own question and answer; plain texts have no fields for them.
        few_shot: the prompt by which a teacher is asked for what it writes to every record.
        written: parts of the records that the tasks lack until it has.
        teacher: another tokenizer, by which and by whose chat template every record is read a second time; a prompt that is
            too long for either of the two is left out, and so is one that config.teacher_context makes too long.
        judges: names the teacher of every record, where it has one of several.
        now: what chat templates take for the time; default: the time.

    Raises DataError naming file and line for a record that is of none of the forms, lacks a field that is asked for, or
    says what the template leaves out.
    """
    require_end(tokenizer, name)
    examples, dropped = [], 0
    loaded = (
        _plain(config, tokenizer, teacher)
        if isinstance(config, PlainPrompts)
        else _instructions(config, tokenizer, tasks, few_shot, written, teacher, judges, now, name)
    )
    for example in loaded:
        if example is None:
            dropped += 1
            continue
        examples.append(example)
        if len(examples) == config.limit:
            break
    if not examples:
        source = getattr(config, "path", config.type)
        if not dropped:
            raise DataError(f"{name}: no prompt in {source}")
        beyond = "" if few_shot is None else f", or method.few_shot.max_prompt_length={few_shot.max_prompt_length}"
        if getattr(config, "teacher_context", None) is not None:
            beyond += f", or with teacher_context over {config.longest_for_teacher}"
        raise DataError(
            f"{name}: no usable prompt in {source}: all {dropped} are over max_prompt_length="
            f"{config.max_prompt_length} tokens, or max_characters{beyond}; raise it"
        )
    return PromptSet(examples, dropped, getattr(config, "path", config.type), getattr(config, "parser", None))


def _instructions(
    config: RecordKeys,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskKeys],
    few_shot: FewShot | None,
    written: Sequence[Part],
    teacher: PreTrainedTokenizerBase | None,
    judges: Judges | None,
    now: datetime | None,
    name: str,
) -> Iterator[Example | None]:
    """None stands for a prompt that is too long, be it that of one task, or the one that the teacher is asked by or reads.

    Tasks and the teacher's prompts are made only for records that are kept: one that is left out stops no run by an error in
    what nobody reads.
    """
    reader = PromptReader(config, tokenizer, now)
    teacher_reader = TeacherReader(config, tokenizer, teacher, now, name)
    asker = None if few_shot is None else PromptReader(_keys_of_few_shot(few_shot, config), tokenizer, now)
    for index, (where, record) in enumerate(records_of(config)):
        judge = None if judges is None else judges.of(where, record)
        said = _conversation(where, record, config)
        pictures = find_pictures(where, where.folder, record)
        read = reader.read(said, pictures, where=where, limited=True)
        if read is None:
            yield None
            continue
        made, maker, asked = {}, None, None
        fields = _fields(record, said.references, config)
        if tasks:
            maker = RecordTasks(tasks, reader, said, pictures, fields, index=index, where=where)
            made = maker.make(dict.fromkeys(written))
        if asker is not None and made is not None:
            question = fill_question(few_shot.prompt, record, where, "method.few_shot.prompt")
            asking = Conversation([{"role": "user", "content": question}])
            asked = asker.read(asking, pictures, where=where, limited=True)
        if made is None or asker is not None and asked is None:
            yield None
            continue
        of_teacher = teacher_reader.read(said, fields, pictures, where)
        if of_teacher is None:
            yield None
            continue
        references = tuple(reference[: config.max_characters] for reference in said.references)
        if references and not references[0]:  # an answer that calls tools alone
            references = (read.answer.strip(), *references[1:])
        reason = read.misplaced or (of_teacher.other and of_teacher.other.misplaced)
        misplaced = None if reason is None else f"{where}: {reason}"
        yield Example(
            index,
            read.ids,
            read.answer_ids,
            read.text,
            references,
            read.extras,
            misplaced=misplaced,
            typed=read.typed or maker is not None and maker.typed,
            tasks=made,
            asked=None if asked is None else TokenSequence(asked.ids, [], index, asked.extras),
            maker=maker if written else None,
            other=of_teacher.other,
            teacher_prompt=of_teacher.text,
            teacher_prompt_ids=of_teacher.ids,
            judge=judge,
        )


def _keys_of_few_shot(few_shot: FewShot, config: RecordKeys) -> InstructionKeys:
    """The way of a few-shot prompt to the teacher: its own template and length, with the bounds of the records."""
    own = few_shot.model_dump(include={*TemplateKeys.model_fields, "max_prompt_length"})
    return InstructionKeys(**own, **config.model_dump(include={"max_characters", "max_image_pixels"}))


def read_question(where: str, record: dict[str, Any], config: QuestionKeys) -> Conversation:
    """The content of a record in the words of config.question, or those of its form, without config.prefix."""
    if config.question is None:
        return parse(where, record)
    return Conversation([{"role": "user", "content": fill_question(config.question, record, where)}])


def _conversation(where: str, record: dict[str, Any], config: RecordKeys) -> Conversation:
    said = read_question(where, record, config).with_prefix(config.prefix)
    return said if config.answer is None else said.with_answer(fill(config.answer, record, where, "answer"))


def _fields(record: dict[str, Any], references: Sequence[str], config: RecordKeys) -> dict[str, Any]:
    """The fields of a record, and the parts of its reference, which are null where there is none to find."""
    if config.parser is None:
        return record
    parts = parse_answer(references[0] if references else "", config.parser)
    return {**record, "rationale": parts.rationale, "label": parts.label}


def _plain(
    config: PlainPrompts, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None
) -> Iterator[Example]:
    special = special_tokens_of(tokenizer)
    for index, (_, text) in enumerate(read_texts(config.path)):
        if index < config.skip:
            continue
        marked = special.mark(text) if config.special_tokens == "text" else text
        ids = encode(tokenizer, marked, True, first=config.prompt_length + config.max_response_length)
        prompt_ids, rest = ids[: config.prompt_length], ids[config.prompt_length :]
        if not rest:
            continue
        response_ids = [*rest, tokenizer.eos_token_id][: config.max_response_length]
        prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        reference = tokenizer.decode(rest[: config.max_response_length], skip_special_tokens=True)
        other = None
        if teacher is not None:
            ended = len(rest) < config.max_response_length
            other = read_plain_otherwise(teacher, prompt, reference, ended=ended, most=config.max_response_length)
        yield Example(index, prompt_ids, response_ids, prompt, (reference,), typed=marked != text, other=other)


def records_of(config: Prompts | Pairs | Labels) -> Iterator[Record]:
    """The records of a source, whatever it is."""
    if config.type == "jsonl":
        return read_jsonl(config.path)
    if config.type == "parquet":
        return read_parquet(config.path)
    if config.type == "hf":
        return read_hf(config.path, config.name, config.split)
    if config.type == "arithmetic":
        return arithmetic_records(config.steps, config.largest, config.split)
    if config.type == "easy_vqa":
        return easy_vqa_records(config.split, config.answers, balanced=config.balanced)
    return pydoc_records(config.split)
