"""Records of every form become prompts with references; what is dropped is counted."""

import copy
import gzip

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from minillm.config.data import JsonlPrompts, PlainPrompts, TaskKeys
from minillm.data.instructions import load_prompts
from minillm.data.sources import DataError
from minillm.models.tokenizers import byte_tokenizer

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def load(tokenizer, path, **config):
    return load_prompts(JsonlPrompts(path=path, **{"template": "none"} | config), tokenizer)


@pytest.mark.parametrize(
    "record, prompt, references",
    [
        ({"instruction": "Why?", "input": "", "output": "So."}, "Why?", ("So.",)),
        ({"instruction": "Why?", "input": "Rain.", "output": "So."}, "Why?\n\nRain.", ("So.",)),
        ({"instruction": "Why?", "output": ["So.", "Thus."]}, "Why?", ("So.", "Thus.")),
        ({"instruction": "Why?", "prompt": "already rendered", "output": "So."}, "Why?", ("So.",)),
        ({"instruction": "Why?", "context": "Rain.", "response": "So."}, "Why?\n\nRain.", ("So.",)),
        ({"instruction": "Why?"}, "Why?", ()),
        ({"prompt": "Why?", "completion": "So."}, "Why?", ("So.",)),
        ({"question": "Why?", "answer": "So."}, "Why?", ("So.",)),
        ({"messages": CHAT}, "Why?", ("So.",)),
        ({"messages": CHAT[:1]}, "Why?", ()),
        ({"messages": [{"role": "system", "content": "Be."}, *CHAT]}, "Be.\n\nWhy?", ("So.",)),
        ({"instruction": None, "messages": None, "prompt": "Why?", "completion": None}, "Why?", ()),
    ],
)
def test_every_form(byte, jsonl, record, prompt, references):
    (example,) = load(byte, jsonl(record))
    assert (example.prompt, example.references, example.index) == (prompt, references, 0)
    assert byte.decode(example.prompt_ids) == prompt
    expected = [*byte(references[0]).input_ids, byte.eos_token_id] if references else []
    assert example.response_ids == expected


@pytest.mark.parametrize(
    "record, message",
    [
        ({"title": "Why?", "body": 1}, "expected instruction/output, .* or messages; found the fields title, body"),
        ({"instruction": 3}, "instruction: expected text, found int"),
        ({"instruction": "Why?", "output": [1]}, "output: expected text, found int"),
        ({"messages": "Why?"}, "messages: expected a list"),
        ({"messages": [{"role": "user"}]}, "messages: expected a list"),
        ({"messages": CHAT[1:]}, "messages: an answer without a question"),
        ({"messages": [{"role": "human", "content": "Why?"}]}, "messages: the role 'human'; known are system, .*user"),
    ],
)
def test_a_record_of_no_form_is_named(byte, jsonl, record, message):
    path = jsonl({"instruction": "Why?"}, record)
    with pytest.raises(DataError, match=f"{path}:2: {message}"):
        load(byte, path)


def test_what_is_no_text_is_named(byte, jsonl):
    path = jsonl({"instruction": "x", "output": "\ud800"})
    with pytest.raises(DataError, match=f"{path}:1: output: half a character"):
        load(byte, path)
    path = jsonl({"messages": [{"role": "user", "content": "\udfff"}]})
    with pytest.raises(DataError, match=f"{path}:1: messages: half a character"):
        load(byte, path)


def test_an_empty_source_says_so(byte, jsonl):
    with pytest.raises(DataError, match=r"data.prompts: no prompt in .*data.jsonl"):
        load(byte, jsonl())


def test_prompts_over_the_length_are_dropped_and_counted(byte, jsonl):
    path = jsonl(*({"instruction": "x" * length, "output": "y"} for length in (3, 9, 4, 5, 1)))
    prompts = load(byte, path, max_prompt_length=4)
    assert [len(example.prompt_ids) for example in prompts] == [3, 4, 1] and prompts.dropped_long == 2
    assert [example.index for example in prompts] == [0, 2, 4], "a dropped prompt must not change the others' noise"
    assert (len(prompts), prompts[1].index, prompts.source) == (3, 2, path)
    assert [example.index for example in load(byte, path, max_prompt_length=4, limit=2)] == [0, 2]
    with pytest.raises(DataError, match=r"data.prompts: no usable prompt in .*: all 1 are over max_prompt_length=4"):
        load(byte, jsonl({"instruction": "x" * 9}), max_prompt_length=4)


@pytest.mark.parametrize("limit, response", [(4, "abc<|end|>"), (3, "abc"), (2, "ab")])
def test_the_eos_stands_only_where_nothing_was_cut(byte, jsonl, limit, response):
    (example,) = load(byte, jsonl({"instruction": "x", "output": "abc"}), max_response_length=limit)
    assert byte.decode(example.response_ids) == response


def test_prompt_and_answer_are_tokenised_together(byte, merging, jsonl):
    """Where a token spans the border the answer is tokenised alone, so that the prompt stays what is sampled from."""
    (example,) = load(merging, jsonl({"instruction": "a:", "output": "b:b"}))
    assert merging.convert_ids_to_tokens(example.prompt_ids) == ["a", ":"]
    assert merging.convert_ids_to_tokens(example.response_ids) == ["b", ":b", "<end>"]
    (example,) = load(merging, jsonl({"instruction": "a", "output": ":b"}))
    assert merging.convert_ids_to_tokens([*example.prompt_ids, *example.response_ids]) == ["a", ":b", "<end>"]


def test_an_empty_prompt_has_a_token_to_start_from(byte, jsonl):
    (example,) = load(byte, jsonl({"prompt": "", "completion": "abc"}))
    assert example.prompt_ids == [byte.eos_token_id]
    assert byte.decode(example.response_ids) == "abc<|end|>"


def test_chat(byte, jsonl):
    path = jsonl({"messages": CHAT}, {"instruction": "Why?", "input": "Rain.", "output": "So."})
    first, second = load(byte, path, template="chat", system="Be.")
    assert first.prompt == "<system>Be.\n<user>Why?\n<assistant>"
    assert second.prompt == "<system>Be.\n<user>Why?\n\nRain.\n<assistant>"
    assert byte.decode(first.response_ids) == "So.<|end|>"


def test_a_chat_answer_ends_as_the_template_ends_it(jsonl):
    """Base models come with templates whose end of turn is not their EOS."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    path = jsonl({"instruction": "Why?", "output": "So."})
    (example,) = load(tokenizer, path, template="chat")
    assert example.prompt == "[user]Why?<|turn|>\n[assistant]"
    assert tokenizer.decode(example.response_ids) == "So.<|turn|>"
    assert tokenizer.decode([*example.prompt_ids, *example.response_ids]) + "\n" == tokenizer.apply_chat_template(
        CHAT, tokenize=False
    )
    (example,) = load(tokenizer, path, template="none")
    assert tokenizer.decode(example.response_ids) == "So.<|end|>"


def test_a_template_that_refuses_a_record_is_named(jsonl):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('too many') }}{% endif %}{{ messages[0]['content'] }}"
    )
    path = jsonl({"messages": CHAT}, {"messages": [*CHAT, *CHAT]})
    with pytest.raises(DataError, match=f"{path}:2: .* refuses the roles user, assistant, user: too many"):
        load(tokenizer, path, template="chat")


def test_beginnings_of_texts(byte, jsonl, tmp_path):
    path = jsonl(*({"text": text} for text in ("left out", "abcdef", "abc", "ghijklmnop")))
    config = PlainPrompts(type="text", path=path, prompt_length=3, max_response_length=4, skip=1)
    first, second = load_prompts(config, byte)
    assert [(example.index, example.prompt, example.references) for example in (first, second)] == [
        (1, "abc", ("def",)),
        (3, "ghi", ("jklm",)),
    ]
    assert byte.decode(first.response_ids) == "def<|end|>" and byte.decode(second.response_ids) == "jklm"


def test_real_instructions(byte, assets):
    dev = load_prompts(JsonlPrompts(path=str(assets / "data/dolly/dev.jsonl"), max_prompt_length=700), byte)
    lines = (assets / "data/dolly/dev.jsonl").read_bytes().count(b"\n")
    assert len(dev) + dev.dropped_long == lines and len(dev) > 100
    assert all(example.references and example.prompt.endswith("### Response:\n") for example in dev)
    train = assets / "data/dolly/train.jsonl.gz"
    with gzip.open(train) as file:
        assert file.readline()
    limited = load_prompts(JsonlPrompts(path=str(train), limit=5, max_prompt_length=2000), byte)
    assert len(limited) == 5


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __len__(self):
        return len(self.tokenizer)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)


WORDS = "once upon a time there was a girl " * 60_000  # 2 million characters


def test_what_is_too_long_in_any_case_is_not_tokenised(byte, jsonl):
    """A record of 50 MB took 117 s and 6.8 GB, to be dropped or cut."""
    path = jsonl({"prompt": WORDS, "completion": "x"}, {"prompt": "Why?", "completion": WORDS})
    tokenizer = Counting(byte)
    prompts = load(tokenizer, path, max_prompt_length=16, max_response_length=16)
    assert (len(prompts), prompts.dropped_long) == (1, 1)
    assert tokenizer.characters < 300_000
    assert byte.decode(prompts[0].response_ids) == WORDS[:16]
    assert prompts[0].references == (WORDS,)


@pytest.mark.parametrize("model", ["models/stories260k", "models/babyllama105"])
def test_the_beginning_of_a_long_answer_is_as_if_all_were_tokenised(assets, jsonl, model):
    tokenizer = AutoTokenizer.from_pretrained(assets / model)
    (example,) = load(tokenizer, jsonl({"prompt": "Once", "completion": WORDS[:200_000]}), max_response_length=500)
    joint = tokenizer("Once" + WORDS[:200_000]).input_ids
    start = len(example.prompt_ids)
    assert joint[:start] == example.prompt_ids and example.response_ids == joint[start : start + 500]


def test_an_answer_is_as_long_as_it_is_allowed_to_be_where_tokens_are_long(byte, jsonl):
    """Sixteen characters and more a token: the text is tokenised further."""
    tokenizer = copy.deepcopy(byte)
    tokenizer.add_tokens([AddedToken("=" * 500, normalized=False)])
    path = jsonl({"prompt": "Why?", "completion": "=" * 500 * 900 + "end"})
    (example,) = load(tokenizer, path, max_prompt_length=1000, max_response_length=800)
    assert example.response_ids == [len(byte)] * 800


def test_a_bound_on_characters_that_no_token_stands_for(byte, jsonl):
    path = jsonl({"prompt": "a" * 11, "completion": "x"}, {"prompt": "b" * 10, "completion": ["y" * 12, "z" * 12]})
    prompts = load(byte, path, max_characters=10)
    assert prompts.dropped_long == 1
    assert prompts[0].references == ("y" * 10, "z" * 10)


def test_texts_to_continue_are_read_as_far_as_they_are_used(byte, tmp_path):
    (tmp_path / "book.txt").write_text(WORDS)
    tokenizer = Counting(byte)
    config = PlainPrompts(type="text", path=str(tmp_path / "book.txt"), prompt_length=8, max_response_length=9)
    (example,) = load_prompts(config, tokenizer)
    assert tokenizer.characters < 100_000
    assert byte.decode(example.prompt_ids + example.response_ids) == WORDS[:17]


def test_fields_make_the_question_and_the_answer(tmp_path, byte):
    path = tmp_path / "sums.jsonl"
    path.write_text(
        '{"Body": "Ann has 3.", "Ask": "And then?", "Equation": "(3)"}\n{"Body": "", "Ask": "", "Equation": null}'
    )
    keys = {"question": "{Body} {Ask}", "answer": "{Equation}", "prefix": "predict: "}
    first, second = load(byte, str(path), **keys)
    assert first.prompt == "predict: Ann has 3. And then?" and first.references == ("(3)",)
    assert byte.decode(first.response_ids) == "(3)" + byte.eos_token
    assert second.references == () and second.response_ids == []
    with pytest.raises(DataError, match=r"sums.jsonl:1: question names the field body, and the record has Body"):
        load(byte, str(path), question="{body}")
    with pytest.raises(DataError, match="sums.jsonl:1: expected instruction"):
        load(byte, str(path), answer="{Equation}")


def test_tasks_are_made_of_every_record(tmp_path, byte):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "1 + 1", "answer": "Add. #### 2"}\n{"question": "2", "answer": "unmarked"}')
    tasks = {
        "label": TaskKeys(prefix="p: ", answer="{label}"),
        "both": TaskKeys(answer="{rationale} So {label} of {question}"),
        "given": TaskKeys(prefix="g: ", answer="{answer}"),
    }
    config = JsonlPrompts(path=str(path), template="alpaca", parser="gsm8k", max_response_length=19)
    first, second = load_prompts(config, byte, tasks=tasks)
    texts = {name: byte.decode(one.response) for name, one in first.tasks.items()}
    assert texts == {
        "label": "2" + byte.eos_token,
        "both": "Add. So 2 of 1 + 1" + byte.eos_token,
        "given": "Add. #### 2" + byte.eos_token,
    }
    assert "### Instruction:\np: 1 + 1\n\n" in byte.decode(first.tasks["label"].prompt)
    assert first.tasks["both"].prompt == first.prompt_ids and first.tasks["label"].key == first.index
    assert [len(one.response) for one in second.tasks.values()] == [0, 0, 9]
    with pytest.raises(DataError, match=r"jsonl:1: the answer of task x names the field label.*data.prompts.parser"):
        load_prompts(config.model_copy(update={"parser": None}), byte, tasks={"x": tasks["label"]})


def test_a_record_is_dropped_where_the_prompt_of_one_task_is_too_long(tmp_path, byte):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "1234", "answer": "x"}\n{"question": "12", "answer": "y"}')
    config = JsonlPrompts(path=str(path), template="none", max_prompt_length=6)
    prompts = load_prompts(config, byte, tasks={"a": TaskKeys(prefix="abc:", answer="{answer}")})
    assert [example.prompt for example in prompts] == ["12"] and prompts.dropped_long == 1
    assert len(load_prompts(config, byte)) == 2
