"""The byte tokenizer takes any text and gives it back; others come from where the configuration says."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minillm.config.data import PydocPrompts
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.data.instructions import load_prompts
from minillm.data.sources import DataError
from minillm.models import tokenizers
from minillm.models.tokenizers import EOS, byte_tokenizer, end_of_turn, load_tokenizer

BYTES = byte_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
@settings(deadline=None)
@example(" leading, trailing  ,\tdouble \r\n")
@example("don't , do n't .")  # what clean-up would change
@example("é\u0301𝔘\x00")
def test_any_text_comes_back(text):
    ids = BYTES(text).input_ids
    assert BYTES.decode(ids) == text
    if EOS not in text:
        assert len(ids) == len(text.encode()) and BYTES.eos_token_id not in ids


def test_the_vocabulary_is_the_bytes_and_an_end():
    assert len(BYTES) == 257 and BYTES.eos_token_id == BYTES.pad_token_id == 256
    assert BYTES("").input_ids == []
    assert BYTES("a" + EOS).input_ids[-1] == 256
    assert BYTES.decode([*BYTES("a").input_ids, 256], skip_special_tokens=True) == "a"


def test_it_is_saved_and_loaded(tmp_path):
    BYTES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "do n't , é𝔘\n"
    assert loaded(text).input_ids == BYTES(text).input_ids and loaded.decode(loaded(text).input_ids) == text
    assert loaded.eos_token == loaded.pad_token == EOS


def test_a_conversation_ends_where_the_answer_begins():
    question = [{"role": "user", "content": "Why?"}]
    prompt = BYTES.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = BYTES.apply_chat_template([*question, {"role": "assistant", "content": "So."}], tokenize=False)
    assert whole.startswith(prompt) and whole.removeprefix(prompt) == f"So.{EOS}\n"


def test_a_named_tokenizer_beats_the_models_own(tmp_path):
    other = byte_tokenizer()
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path)
    config = {"path": str(tmp_path)}
    assert len(load_tokenizer(TeacherConfig(**config), tmp_path)) == 258
    assert len(load_tokenizer(TeacherConfig(**config, tokenizer="byte"), tmp_path)) == 257


def endless() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_tokenizer_without_an_end_takes_the_models(build_model, tmp_path):
    """The data closes reference answers with the tokenizer's EOS, before any weight is read."""
    endless().save_pretrained(tmp_path)
    model = build_model("llama")
    model.generation_config.eos_token_id = [70, 2, 1]
    model.save_pretrained(tmp_path)
    config = TeacherConfig(path=str(tmp_path))
    assert load_tokenizer(config, tmp_path).eos_token == "c", "70 is no id of the tokenizer's"
    (tmp_path / "generation_config.json").unlink()
    assert load_tokenizer(config, tmp_path).eos_token == "a", "the architecture's is 0"
    student = {"path": None, "init": "random", "tokenizer": str(tmp_path)}
    random = StudentConfig(**student, config={"model_type": "llama", "eos_token_id": 1})
    assert load_tokenizer(random, tmp_path).eos_token == "b"
    random = StudentConfig(**student, config={"model_type": "llama"})
    with pytest.raises(DataError, match=r"data\.prompts: the tokenizer has no EOS token"):
        load_prompts(PydocPrompts(type="pydoc", template="none"), load_tokenizer(random, tmp_path))


TURNS = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}CLOSE\n{% endfor %}"


@pytest.mark.parametrize(
    "template, expected",
    [
        (TURNS.replace("CLOSE", "<|turn|>"), "<|turn|>"),
        (TURNS.replace("CLOSE", EOS), EOS),
        (TURNS.replace("CLOSE", "<|turn|><|end|>"), "<|turn|>"),  # the first of several
        (TURNS.replace("CLOSE", ""), None),
        (TURNS.replace("CLOSE", "</s>"), None),  # text to this tokenizer
        ("<|start|>nothing of it<|turn|>", None),
        ("{{ raise_exception('only system messages') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_the_templates(template, expected):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|start|>", "<|turn|>")])
    tokenizer.chat_template = template
    found = end_of_turn(tokenizer)
    assert (found if found is None else tokenizer.convert_ids_to_tokens(found)) == expected


def test_the_revision_is_the_models_and_not_that_of_another_tokenizer(tmp_path, monkeypatch):
    asked = []

    def load(where, **options):
        asked.append((where, options))
        return BYTES

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(tokenizers, "load_processor", lambda where, **options: None)
    config = {"path": "some/model", "revision": "abc"}
    load_tokenizer(TeacherConfig(**config), tmp_path)
    load_tokenizer(TeacherConfig(**config, tokenizer="other/tokenizer"), tmp_path)
    assert [(where, options.get("revision")) for where, options in asked] == [
        ("some/model", "abc"),
        ("other/tokenizer", None),
    ]
