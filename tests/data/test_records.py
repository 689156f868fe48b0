"""A field that changes what a record says is read, or refused with file and line: none is dropped."""

import pytest

from minillm.config.data import JsonlPrompts
from minillm.data.instructions import load_prompts
from minillm.data.sources import DataError
from tests.data.chat_templates import ALTERNATING, CALLING, CHATML, DEAF, OPENED, THINKING, TOOLS, chat_tokenizer

USER, BOT = "<|im_start|>user\n", "<|im_start|>assistant\n"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
ASK = {"role": "user", "content": "Why?"}


def load(path, chat_template=CHATML, **keys):
    keys = {"template": "chat", "max_prompt_length": 1000, **keys}
    return load_prompts(JsonlPrompts(path=path, **keys), chat_tokenizer(chat_template))


@pytest.mark.parametrize(
    "record, prompt, reference",
    [
        ({"system": "Be.", "prompt": "Why?", "completion": "So."}, "<|im_start|>system\nBe.<|im_end|>\n" + USER + "Why?", "So."),
        ({"system_prompt": "Be.", "question": "Why?", "response": "So."}, "<|im_start|>system\nBe.<|im_end|>\n" + USER + "Why?", "So."),
        ({"question": "Why?", "response": "So."}, USER + "Why?", "So."),
        ({"prompt": "Why?", "answer": "So."}, USER + "Why?", "So."),
        ({"question": "Why?", "context": "Rain.", "answer": "So."}, USER + "Why?\n\nRain.", "So."),
        ({"prompt": "Why?", "input": "Rain.", "output": "So."}, USER + "Why?\n\nRain.", "So."),
        ({"instruction": "Why?", "input": "Rain.", "prompt": "Rain, why?", "completion": "So."}, USER + "Rain, why?", "So."),
        (
            {"history": [["A?", "B."]], "instruction": "Why?", "output": "So."},
            f"{USER}A?<|im_end|>\n{BOT}B.<|im_end|>\n{USER}Why?",
            "So.",
        ),
        ({"history": [], "system": "", "instruction": "Why?", "output": "So."}, USER + "Why?", "So."),
        ({"prompt": [ASK], "completion": [{"role": "assistant", "content": "So."}]}, USER + "Why?", "So."),
        ({"messages": [ASK], "answer": "So."}, USER + "Why?", "So."),
        ({"system": "Be.", "messages": [ASK]}, "<|im_start|>system\nBe.<|im_end|>\n" + USER + "Why?", None),
        ({"prompt": "Why?", "completion": "So.", "weight": 1, "chosen": "So.", "rejected": "No."}, USER + "Why?", "So."),
    ],
)  # fmt: skip
def test_fields_that_are_read(jsonl, record, prompt, reference):
    (example,) = load(jsonl(record))
    assert example.prompt == f"{prompt}<|im_end|>\n{BOT}"
    assert example.references == (() if reference is None else (reference,))


@pytest.mark.parametrize(
    "record, said",
    [
        ({"tools": [WEATHER], "prompt": "Why?"}, "leaves out the tools .*'weather'"),
        ({"tools": "[{", "prompt": "Why?"}, "tools: not JSON"),
        ({"tools": [{"city": 1}], "prompt": "Why?"}, "tools: expected a list"),
        ({"functions": [{"name": "weather"}], "prompt": "Why?"}, "functions would be ignored; give them as tools"),
        ({"documents": ["x"], "prompt": "Why?"}, "documents would be ignored"),
        ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "leaves out its tool calls"),
        ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ASK]}, "the tool calls of message 2"),
        ({"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]}, "a tool call must be"),
        ({"messages": [ASK, {"role": "assistant", "content": "", "function_call": CALL}]}, "function_call would be ignored"),
        ({"messages": [ASK, {"role": "assistant", "content": "So.", "reasoning_content": "Hm"}]}, "leaves out reasoning_content"),
        ({"prompt": "Why?", "completion": "So.", "thinking": "Hm"}, "leaves out reasoning_content"),
        ({"prompt": "Why?", "reasoning": "Hm"}, "reasoning without an answer"),
        ({"messages": [{**ASK, "name": "Bob"}]}, "leaves out the name 'Bob' of message 1"),
        ({"messages": [ASK], "input": "Rain."}, "input beside messages"),
        ({"messages": [ASK], "history": [["a", "b"]]}, "history beside messages"),
        ({"messages": [{"role": "system", "content": "A"}, ASK], "system": "B"}, "both have a system message"),
        ({"system": "A", "system_prompt": "B", "prompt": "Why?"}, "system and system_prompt differ"),
        ({"history": ["a"], "prompt": "Why?"}, r"history: expected a list of \[question, answer\]"),
        ({"instruction": "Why?", "input": "a", "context": "b"}, "input and context differ"),
        ({"instruction": "Answer.", "question": "Why?", "answer": "So."}, "instruction and question differ"),
        ({"prompt": "Why?", "completion": "So.", "response": "No."}, "response and completion differ"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "chosen would be ignored"),
        ({"question": "Why?", "solution": "So."}, "solution would be ignored"),
        ({"prompt": "Why?", "completion": "So.", "weight": 0.5}, "weight is 0.5, and every answer counts alike"),
        ({"messages": [ASK, {"role": "assistant", "content": "So.", "weight": 0}]}, "the answer's weight is 0"),
        ({"messages": [ASK, {"role": "assistant", "content": "So.", "train": False}]}, "the answer's train is false"),
        ({"prompt": "Why?", "chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs: .* reads no thinking"),
        ({"prompt": "Why?", "videos": ["a.mp4"]}, "videos would be ignored"),
    ],
)  # fmt: skip
def test_fields_that_would_be_lost_are_refused(jsonl, record, said):
    path = jsonl({"prompt": "Well?"}, record)
    with pytest.raises(DataError, match=f"^{path}:2: .*{said}"):
        load(path)


@pytest.mark.parametrize("template", ["none", "alpaca"])
@pytest.mark.parametrize(
    "record",
    [
        {"tools": [WEATHER], "prompt": "Why?"},
        {"prompt": "Why?", "completion": "So.", "reasoning_content": "Hm"},
        {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        {"prompt": "Why?", "chat_template_kwargs": {"messages": 1}},
    ],
)
def test_what_only_a_chat_can_say_is_refused_elsewhere(jsonl, record, template):
    with pytest.raises(DataError, match=f":1: (template {template} has no place for|chat_template_kwargs: )"):
        load(jsonl(record), TOOLS, template=template)


def test_tools_and_a_final_call_are_the_templates(jsonl):
    answer = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "1"}]}
    as_text = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Köln"}'}}]}  # fmt: skip
    for message in (answer, as_text):
        (example,) = load(jsonl({"tools": [WEATHER], "messages": [ASK, message]}), TOOLS)
        assert '"name": "weather", "parameters"' in example.prompt
        assert example.references == ('<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>',)
        assert chat_tokenizer().decode(example.response_ids) == example.references[0] + "<|im_end|>"


@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'])
def test_calls_of_tools_are_given_in_the_form_that_the_template_reads(jsonl, arguments):
    """DeepSeek's wants arguments that are text, and no content; the thoughts that the prompt has opened are closed first."""
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": None, "reasoning_content": "Again.", "tool_calls": [call, call]},
    ]
    written = '<call>function weather\n{"city": "Köln"}</call>'
    (example,) = load(jsonl({"messages": turns}), CALLING)
    assert f"<|assistant|>{written}<|im_end|><out>rain</out>" in example.prompt
    assert example.prompt.endswith("<|assistant|><think>\n") and example.misplaced is None
    answer = chat_tokenizer().decode(example.response_ids)
    assert answer == f"Again.\n</think>\n\n{written}{written}<|im_end|>"
    del turns[-1]["reasoning_content"]
    (example,) = load(jsonl({"messages": turns}), CALLING)
    assert example.references == (written + written,)
    assert "begins the answer with <think>, and the reference has no thoughts" in example.misplaced
    with pytest.raises(
        DataError, match="shows no answer that calls tools after its prompt"
    ):  # its content alone is shown
        load(jsonl({"messages": [*turns[:-1], {**turns[-1], "content": "Hm."}]}), CALLING)


def test_results_of_tools_are_shown(jsonl):
    turns = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "1", "content": '{"sky": "rain"}'},
        {"role": "assistant", "content": "So."},
    ]
    (example,) = load(jsonl({"tools": [WEATHER], "messages": turns}), TOOLS)
    assert '<|im_start|>tool\n{"sky": "rain"}<|im_end|>' in example.prompt and example.references == ("So.",)


def test_thoughts_are_part_of_the_answer(jsonl):
    path = jsonl({"prompt": "Why?", "completion": "So.", "reasoning_content": "Hm."})
    for template in (THINKING, OPENED):
        (example,) = load(path, template)
        text = chat_tokenizer().decode([*example.prompt_ids, *example.response_ids])
        assert text.endswith("<think>\nHm.\n</think>\n\nSo.<|im_end|>") and text.count("<think>") == 1
        assert example.references == ("So.",) and example.misplaced is None


def test_a_system_message_that_a_template_does_not_take(jsonl):
    path = jsonl({"prompt": "Why?"}, {"system": "Be brief.", "prompt": "Why?"})
    with pytest.raises(DataError, match=f"^{path}:2: .* refuses the roles system, user: System role not supported"):
        load(path, ALTERNATING)
    with pytest.raises(DataError, match=f"^{path}:2: .* leaves out what message 1 says .system: 'Be brief.'"):
        load(path, DEAF)


def test_a_records_system_message_beats_the_configured_one(jsonl):
    first, second = load(jsonl({"prompt": "Why?"}, {"system": "Be.", "prompt": "Why?"}), system="Ours.")
    assert first.prompt.startswith("<|im_start|>system\nOurs.<|im_end|>") and "Ours." not in second.prompt
