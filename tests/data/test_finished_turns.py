"""Answers stand where the chat template writes them; what it would leave out is refused."""

from datetime import datetime

import pytest
from tokenizers import AddedToken

from minillm.config.data import JsonlPrompts
from minillm.data.instructions import load_prompts
from minillm.data.sources import DataError
from tests.data.chat_templates import CHATML, DATED, OPENED, PARTS, THINKING, chat_tokenizer

WHY = {"prompt": "Why?", "completion": "So."}


def load(path, template, **keys):
    now = keys.pop("now", None)
    return load_prompts(JsonlPrompts(path=path, template="chat", **keys), chat_tokenizer(template), now=now)


def whole(example):
    return chat_tokenizer().decode([*example.prompt_ids, *example.response_ids])


@pytest.mark.parametrize("template", [CHATML, THINKING, PARTS])
def test_prompt_and_answer_are_the_finished_turn(jsonl, template):
    tokenizer = chat_tokenizer(template)
    (example,) = load(jsonl(WHY), template)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    if template == PARTS:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    assert whole(example) + "\n" == tokenizer.apply_chat_template(turns, tokenize=False)
    assert "Why?" in example.prompt and example.references == ("So.",)


def test_template_kwargs_reach_the_template(jsonl):
    (example,) = load(jsonl(WHY), THINKING, template_kwargs={"enable_thinking": False})
    assert example.prompt.endswith("<think>\n\n</think>\n\n")
    assert chat_tokenizer().decode(example.response_ids) == "So.<|im_end|>"
    (example,) = load(jsonl({**WHY, "chat_template_kwargs": {"enable_thinking": False}}), THINKING)
    assert example.prompt.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "name, said", [("enable_thoughts", "reads no enable_thoughts"), ("tools", "is set by minillm")]
)
def test_template_kwargs_that_have_no_effect_are_refused(jsonl, name, said):
    with pytest.raises(DataError, match=f"^template_kwargs: .*{said}"):
        load(jsonl(WHY), THINKING, template_kwargs={name: False})


@pytest.mark.parametrize(
    "answer, response",
    [
        ("<think>\nHm.\n</think>\n\nSo.", "Hm.\n</think>\n\nSo.<|im_end|>"),
        ("Hm.\n</think>\n\nSo.", "Hm.\n</think>\n\nSo.<|im_end|>"),
    ],
)
def test_thoughts_that_the_prompt_has_opened_are_not_opened_again(jsonl, answer, response):
    (example,) = load(jsonl({"prompt": "Why?", "completion": answer}), OPENED)
    assert example.prompt.endswith("<think>\n")
    assert chat_tokenizer().decode(example.response_ids) == response and example.misplaced is None


@pytest.mark.parametrize("answer", ["So.", "", "<b>So.</b>", "<|im_end|>"])  # "<" begins the tag, too
def test_an_answer_without_the_thoughts_that_the_prompt_has_opened_is_told_of(jsonl, answer):
    path = jsonl({"prompt": "Why?", "completion": answer})
    (example,) = load(path, OPENED)
    assert example.misplaced.startswith(f"{path}:1: the chat template begins the answer with <think>")
    assert example.references == (answer,), "it can be compared with answers"


@pytest.mark.parametrize("answer", ["{{ raise_exception('no answers') }}", "<assistant> {{ m.content }}"])
def test_a_role_between_angle_brackets_is_no_thought(jsonl, answer):
    """Neither where the template refuses the finished turn nor where it spaces it otherwise."""
    turns = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}" + answer + "{% endif %}{% endfor %}"
    )
    (example,) = load(jsonl(WHY), turns + "{% if add_generation_prompt %}<assistant>\n{% endif %}")
    assert example.prompt == "Why?<assistant>\n" and example.misplaced is None
    assert chat_tokenizer().decode(example.response_ids).startswith("So.")


def test_an_answer_that_is_closed_by_several_tokens_ends_with_the_turns(jsonl):
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}<|user|>")
    (example,) = load(jsonl(WHY), template)
    assert chat_tokenizer().decode(example.response_ids) == "So.<|user|><|im_end|>"[: len("So.<|user|>")]


def test_a_question_that_the_template_drops_is_refused(jsonl):
    path = jsonl(WHY)
    with pytest.raises(DataError, match=f"^{path}:1: the tokenizer's chat template leaves out what message 1 says"):
        load(path, CHATML.replace("{{ m.content }}", ""))


def test_the_time_of_a_template_is_the_one_that_is_given(jsonl):
    then = datetime(2024, 2, 3, 4, 5, 6)
    (example,) = load(jsonl(WHY), DATED, now=then)
    assert example.prompt.startswith("<|im_start|>system\nToday: 03 Feb 2024<|im_end|>\n<|im_start|>user\nWhy?")
    template = DATED.replace("%d %b %Y", "%A %-d. %B %y, %H:%M:%S %j")
    (example,) = load(jsonl(WHY), template, now=then)
    assert f"Today: {then:%A %-d. %B %y, %H:%M:%S %j}<" in example.prompt
    (example,) = load(jsonl(WHY), DATED)
    assert f"Today: {datetime.now():%d %b %Y}" in example.prompt


def test_a_template_of_two_names_takes_the_one_for_tools(jsonl):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    tokenizer.add_tokens([AddedToken("<|x|>", special=True)])
    path = jsonl({**WHY, "tools": [{"name": "weather"}]}, WHY)
    with_tools, without = load_prompts(JsonlPrompts(path=path, template="chat"), tokenizer)
    assert "weather" in with_tools.prompt and "weather" not in without.prompt
