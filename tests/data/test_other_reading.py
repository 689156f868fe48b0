"""Records read a second time by a teacher with another tokenizer and chat template."""

import pytest

from minillm.config.data import JsonlPrompts, PlainPrompts
from minillm.data.instructions import load_prompts
from minillm.data.sources import DataError
from minillm.data.tokenization import written_text
from tests.other_tokenizer import small_bpe


@pytest.fixture(scope="module")
def other():
    return small_bpe()


def load(byte, other, path, **config):
    return load_prompts(JsonlPrompts(path=path, **{"template": "chat"} | config), byte, teacher=other)


def test_each_side_renders_the_messages_by_its_own_template(byte, other, jsonl):
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "the cat?"}]
    path = jsonl({"messages": [*messages, {"role": "assistant", "content": "it sat"}]})
    (example,) = load(byte, other, path)
    assert byte.decode(example.prompt_ids) == "<system>Be.\n<user>the cat?\n<assistant>"
    reading = example.other
    assert other.decode(reading.ids) == "[system]Be.[user]the cat?[assistant]"
    assert other.decode(reading.answer_ids[:-1]) == "it sat" == byte.decode(example.response_ids[:-1])
    assert reading.answer_ids[-1] == reading.end == other.eos_token_id and not reading.special
    assert reading.answered(other, "it sat", ended=True) == reading.answer_ids
    assert reading.answered(other, "it sat", ended=False) == reading.answer_ids[:-1]


def test_without_a_chat_template_both_read_one_text(byte, other, jsonl):
    (example,) = load(byte, other, jsonl({"instruction": "the cat?", "output": "sat"}), template="alpaca")
    assert other.decode(example.other.ids) == byte.decode(example.prompt_ids) == example.prompt
    assert example.other.special and example.other.end == other.eos_token_id


def test_an_answer_that_spells_a_special_token_of_the_other_side_is_text(byte, other, jsonl):
    (example,) = load(byte, other, jsonl({"instruction": "the?", "output": "a </s> b"}))
    assert other.decode(example.other.answer_ids[:-1]) == "a </s> b"
    assert other.eos_token_id not in example.other.answer_ids[:-1]
    assert example.other.answered(other, "a </s> b", ended=True) == example.other.answer_ids


def test_a_prompt_too_long_for_either_is_dropped_and_counted(byte, other, jsonl):
    words = "the cat sat a dog ran off we saw it"  # ten words, 35 bytes
    path = jsonl(
        {"instruction": words, "output": "x"},
        {"instruction": "?" * 25, "output": "x"},
        {"instruction": "the", "output": "x"},
    )
    read = load(byte, other, path, template="none", max_prompt_length=30)
    assert [example.index for example in read] == [1, 2] and read.dropped_long == 1
    # 25 question marks are as many tokens of the other side, words fewer: its template is what makes it too long there
    read = load_prompts(JsonlPrompts(path=path, template="none", max_prompt_length=20), other, teacher=byte)
    assert [example.index for example in read] == [2] and read.dropped_long == 2


def test_prompts_without_an_answer_have_none_on_either_side(byte, other, jsonl):
    (example,) = load(byte, other, jsonl({"instruction": "the?"}))
    assert example.response_ids == [] == example.other.answer_ids and example.other.end == other.eos_token_id


def test_plain_texts_are_cut_where_the_student_cuts_them(byte, other, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on it")
    config = PlainPrompts(type="text", path=str(tmp_path / "a.txt"), prompt_length=7, max_response_length=100)
    (example,) = load_prompts(config, byte, teacher=other)
    assert other.decode(example.other.ids) == "the cat" and other.decode(example.other.answer_ids[:-1]) == " sat on it"
    assert example.other.answer_ids[-1] == other.eos_token_id
    (cut,) = load_prompts(config.model_copy(update={"max_response_length": 4}), byte, teacher=other)
    assert other.decode(cut.other.answer_ids) == " sat"
    shorter = config.model_copy(update={"prompt_length": 2, "max_response_length": 2})
    (cut,) = load_prompts(shorter, other, teacher=byte)  # of whose tokens a word has several
    assert other.decode(cut.response_ids) == " sat on" and byte.decode(cut.other.answer_ids) == " s"


def test_pictures_are_refused_by_record(byte, other, jsonl):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    path = jsonl({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]})
    with pytest.raises(DataError, match="data.jsonl"):
        load(byte, other, path)


def test_the_text_that_an_answer_adds_to_its_prompt(byte):
    metaspace = small_bpe(metaspace=True)
    prompt, answer = metaspace("the cat").input_ids, metaspace("sat").input_ids
    assert written_text(metaspace, prompt, answer) == " sat"  # alone, its space would be lost
    snow = "é☃".encode()
    ids = byte("é☃").input_ids
    assert written_text(byte, ids[:1], ids[1:]) == "é☃".encode()[1:].decode(errors="replace")
    assert len(snow) == len(ids)
