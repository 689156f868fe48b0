"""The byte tokenizer takes any text and gives it back; others come from where the configuration says."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from minillm.config.models import TeacherConfig
from minillm.models.tokenizers import EOS, byte_tokenizer, load_tokenizer

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
