"""How an instruction is put to a model."""

import copy

import pytest

from minillm.config.data import InstructionKeys
from minillm.data.sources import DataError
from minillm.data.templates import alpaca, render
from minillm.models.tokenizers import end_of_turn

QUESTION = [{"role": "user", "content": "Why?"}]


def test_alpaca_is_the_published_format():
    assert alpaca("Why?", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhy?\n\n### Response:\n"
    )
    assert alpaca("Why?", "Rain.") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\nWhy?\n\n### Input:\nRain.\n\n### Response:\n"
    )


def test_alpaca_is_what_the_published_data_holds(assets):
    import json

    lines = (assets / "data/dolly/dev.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert any(record["input"] for record in records) and not all(record["input"] for record in records)
    for record in records:
        assert alpaca(record["instruction"], record["input"]).strip() == record["prompt"].strip()


def test_none_is_the_text_alone(byte):
    keys = InstructionKeys(template="none")
    assert render(QUESTION, keys, byte).prompt == "Why?"
    assert render(QUESTION, keys, byte, context="Rain.").prompt == "Why?\n\nRain."


def test_context_goes_into_the_last_message_and_leaves_the_record_alone(byte):
    messages = [{"role": "assistant", "content": "Hm."}, *QUESTION]
    text = render(messages, InstructionKeys(template="chat"), byte, context="Rain.").prompt
    assert text == "<assistant>Hm.<|end|>\n<user>Why?\n\nRain.\n<assistant>"
    assert messages[-1]["content"] == "Why?"


def test_chat_needs_a_template(merging):
    with pytest.raises(DataError, match="this one has none"):
        render(QUESTION, InstructionKeys(template="chat"), merging)


@pytest.mark.parametrize(
    "template, named",
    [
        ("{% for i in range(999999999999) %}{{ i }}{% endfor %}", "OverflowError: Range too big"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_named_with_the_record(byte, template, named):
    tokenizer = copy.deepcopy(byte)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"data.jsonl:3: the tokenizer's chat template .*{named}"):
        render(QUESTION, InstructionKeys(template="chat"), tokenizer, where="data.jsonl:3")
    assert end_of_turn(tokenizer) is None
