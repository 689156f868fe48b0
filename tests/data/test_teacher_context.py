"""What the teacher alone reads beside a prompt: where it comes from, where it stands, and what is refused."""

import json

import pytest
import torch

from minillm.config.data import ArithmeticPrompts, JsonlPrompts
from minillm.data.instructions import load_prompts
from minillm.data.sources import DataError
from minillm.data.teacher_context import write_summary
from minillm.models.tokenizers import byte_tokenizer
from tests.data.chat_templates import CHATML
from tests.other_tokenizer import small_bpe
from tests.pictures import build_processor, picture

RECORD = {"instruction": "1 + 1?", "output": "2", "hint": "a sum", "tries": 3}


def load(tokenizer, path, *, teacher=None, **config):
    return load_prompts(JsonlPrompts(path=path, **{"template": "none"} | config), tokenizer, teacher=teacher)


def texts(tokenizer, read) -> list[tuple[str, str]]:
    """The prompts in the ids of the student, and in those of the teacher."""
    return [(tokenizer.decode(one.prompt_ids), tokenizer.decode(one.prompt_for("teacher"))) for one in read]


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ("hint", "1 + 1?\n\na sum"),  # the name of a field
        ("{hint} of {tries}", "1 + 1?\n\na sum of 3"),
        ("{{{reference}}}", "1 + 1?\n\n{2}"),  # the answer, whatever it is called
        ("Think first.", "1 + 1?\n\nThink first."),  # the same for all
    ],
)
def test_it_is_a_field_or_a_text_with_fields(byte, jsonl, context, told):
    read = load(byte, jsonl(RECORD), teacher_context=context)
    assert texts(byte, read) == [("1 + 1?", told)] and read[0].teacher_prompt == told and read.told == 1
    sequence = read[0].sequence
    assert sequence.prompt == byte("1 + 1?").input_ids and sequence.response == [
        *byte("2").input_ids,
        byte.eos_token_id,
    ]
    assert sequence.read_by_teacher().prompt == byte(told).input_ids
    assert sequence.read_by_teacher().response == sequence.response
    assert list(byte(told).input_ids) in list(read.ids())  # which both models must know


def test_the_form_says_where_it_stands(byte, jsonl):
    keys = {"teacher_context": "hint", "teacher_prompt": "({context}) {{{prompt}}}"}
    assert texts(byte, load(byte, jsonl(RECORD), **keys)) == [("1 + 1?", "(a sum) {1 + 1?}")]
    alpaca = load(byte, jsonl(RECORD | {"input": "in words"}), **keys, template="alpaca")
    ((student, teacher),) = texts(byte, alpaca)
    assert teacher == student.replace("1 + 1?", "(a sum) {1 + 1?}") and "### Input:\nin words" in teacher


def test_in_a_chat_it_is_in_the_last_message_of_the_user(jsonl):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    turns = [("system", "Be."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "1 + 1?"), ("assistant", "2")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns], "hint": "<|im_end|> is text"}
    ((student, teacher),) = texts(tokenizer, load(tokenizer, jsonl(record), template="chat", teacher_context="hint"))
    assert student.count("user\n") == 2 and "hint" not in student
    assert teacher == student.replace("1 + 1?", "1 + 1?\n\n<|im_end|> is text")
    nobody = {"messages": [{"role": "system", "content": "Be."}], "answer": "2", "hint": "x"}
    with pytest.raises(DataError, match="stands in a message of the user, and there are those of system"):
        load(tokenizer, jsonl(nobody), template="chat", teacher_context="hint")


def test_where_nothing_is_told_the_teacher_reads_what_the_student_does(byte, jsonl):
    path = jsonl(RECORD | {"hint": ""}, RECORD)
    empty, told = load(byte, path, teacher_context="hint")
    (plain, _) = load(byte, path)
    assert empty == plain and empty.sequence.teacher_prompt is None and told.sequence.teacher_prompt is not None


def test_a_record_without_the_field_is_named(byte, jsonl):
    path = jsonl(RECORD, {"instruction": "1 + 2?", "output": "3"})
    with pytest.raises(DataError, match=r":2: data.prompts.teacher_context names the field hint, and the record has"):
        load(byte, path, teacher_context="hint")
    with pytest.raises(DataError, match=":1: data.prompts.teacher_context names the field hint, which is null here"):
        load(byte, jsonl(RECORD | {"hint": None}), teacher_context="hint")
    with pytest.raises(DataError, match="hint: expected text or a number, found list"):
        load(byte, jsonl(RECORD | {"hint": ["a"]}), teacher_context="hint")
    with pytest.raises(DataError, match="names the field reference"):
        load(byte, jsonl({"instruction": "x"}), teacher_context="{reference}")


def test_a_prompt_that_is_too_long_with_it_is_dropped_and_counted(byte, jsonl):
    path = jsonl(RECORD, RECORD | {"hint": "x" * 20}, RECORD | {"hint": ""})
    keys = {"teacher_context": "hint", "max_prompt_length": 15}
    read = load(byte, path, **keys)
    assert [one.index for one in read] == [0, 2] and read.dropped_long == 1
    assert len(load(byte, path, **keys, max_teacher_prompt_length=28)) == 3
    # a bound for the teacher is none for the student
    assert (
        load(byte, jsonl(RECORD, RECORD | {"instruction": "x" * 20}), **keys, max_teacher_prompt_length=90).dropped_long
        == 1
    )
    with pytest.raises(DataError, match="with teacher_context over 10"):
        load(byte, path, teacher_context="{hint}{hint}xxxxxxxx", max_prompt_length=10)


def test_nothing_is_told_beside_a_prompt_that_the_student_does_not_read(byte, jsonl):
    long = {"instruction": "x" * 20, "output": "2"}
    keys = {"teacher_context": "hint", "max_prompt_length": 19, "max_teacher_prompt_length": 90}
    read = load(byte, jsonl(long, RECORD, long | {"hint": None}), **keys)
    assert [one.index for one in read] == [1] and read.dropped_long == 2
    with pytest.raises(DataError, match=r":1: data.prompts.teacher_context names the field hint, and the record has"):
        load(byte, jsonl(long, RECORD), **keys | {"max_prompt_length": 20})


@pytest.fixture(scope="module")
def processor():
    return build_processor("llava")


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("content", "form", "told"),
    [
        ("what?", "{prompt} {context}", "<image>what? a cat"),  # before the question where nothing says where
        ("is <image> one?", "{context}: {prompt}", "a cat: is <image> one?"),
        ([{"type": "text", "text": "is "}, IMAGE, {"type": "text", "text": " one?"}], "{context}: {prompt}", "a cat: is <image> one?"),
        ([IMAGE, {"type": "text", "text": "what?"}], "{{{context}}} {prompt}", "{a cat} <image>what?"),
    ],
)  # fmt: skip
def test_pictures_stay_where_they_are_in_the_prompt(content, form, told, processor, jsonl, tmp_path):
    """The teacher reads them in its own prompt, as the very tensors that the student is shown."""
    picture(1).save(tmp_path / "1.png")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    path = jsonl({"messages": messages, "image": "1.png", "hint": "a cat"})
    keys = {"template": "chat", "teacher_context": "hint", "teacher_prompt": form}
    (one,) = load(processor.tokenizer, path, **keys)
    assert one.teacher_prompt == f"<user>{told}\n<assistant>"
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ours, theirs = one.prompt_ids, one.teacher_prompt_ids
    assert theirs.count(image) == ours.count(image) > 1
    without = processor.tokenizer.decode([token for token in theirs if token != image])
    assert without == one.teacher_prompt.replace("<image>", "")
    read = one.sequence.read_by_teacher()
    assert read.prompt == theirs and dict(read.extras).keys() == dict(one.extras).keys() == {"pixel_values"}
    assert torch.equal(read.extras["pixel_values"], one.extras["pixel_values"])


def test_pictures_that_the_teacher_would_be_shown_otherwise_are_refused(processor, jsonl, tmp_path):
    picture(1).save(tmp_path / "1.png")
    record = {"instruction": "is <image> one?", "output": "yes", "image": "1.png", "hint": "a cat"}
    keys = {"template": "chat", "teacher_context": "hint"}
    with pytest.raises(
        DataError, match="as the teacher reads it: 1 pictures in image or images, but 2 places for them"
    ):
        load(processor.tokenizer, jsonl(record), **keys, teacher_prompt="{prompt} {prompt} {context}")
    parts = [{**IMAGE, "path": "1.png"}, {"type": "text", "text": "what?"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}], "hint": "x"}
    with pytest.raises(
        DataError, match="it is shown 0 pictures, and the student 1; teacher_prompt must have {prompt} once"
    ):
        load(processor.tokenizer, jsonl(record), **keys, teacher_prompt="{context}")
    with pytest.raises(DataError, match="which are not read by a teacher with another tokenizer"):
        load(processor.tokenizer, jsonl(record), **keys, teacher=small_bpe())


def test_a_teacher_with_another_tokenizer_is_told_by_its_own_template(byte, jsonl):
    other = small_bpe()
    record = {"instruction": "the cat?", "output": "it sat", "hint": "we saw it"}
    read = load(byte, jsonl(record), template="chat", teacher=other, teacher_context="hint")
    assert other.decode(read[0].other.ids) == "[user]the cat?\n\nwe saw it[assistant]" == read[0].teacher_prompt
    assert byte.decode(read[0].prompt_ids) == "<user>the cat?\n<assistant>" and read[0].sequence.teacher_prompt is None
    assert other.decode(read[0].other.answer_ids[:-1]) == "it sat"


def test_parts_of_the_reference_are_fields(byte):
    config = ArithmeticPrompts(
        type="arithmetic", steps=1, limit=1, parser="gsm8k", teacher_context="{label}; {rationale}"
    )
    (example,) = load_prompts(config, byte)
    assert (
        example.teacher_prompt
        == f"{example.prompt}\n\n{example.references[0].split()[-1]}; {example.references[0].splitlines()[0]}"
    )


def test_a_summary_shows_some_of_them(byte, jsonl, tmp_path):
    read = load(byte, jsonl(*[RECORD | {"hint": ""}] * 2, *[RECORD] * 4), teacher_context="hint")
    write_summary(tmp_path / "stage", [(one.prompt, one.teacher_prompt) for one in read])
    found = json.loads((tmp_path / "stage" / "teacher_context.json").read_text())
    assert found == {
        "prompts": 6,
        "with_context": 4,
        "samples": [{"student": "1 + 1?", "teacher": "1 + 1?\n\na sum"}] * 3,
    }
