"""Pairs of answers from records of every form; what is no pair is named by file and line, or counted."""

import json

import pytest
import torch

from minillm.config.data import HfPairs, JsonlPairs, ParquetPairs
from minillm.data.instructions import require_shared_pictures
from minillm.data.pairs import load_pairs
from minillm.data.sources import DataError
from minillm.models.tokenizers import byte_tokenizer
from tests.pictures import build_processor, picture

ASKED = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be."}
GOOD, BAD = {"role": "assistant", "content": "So."}, {"role": "assistant", "content": "Thus"}
TEXTS = {"chosen": "So.", "rejected": "Thus"}


def load(tokenizer, path, **keys):
    return load_pairs(JsonlPairs(path=path, **{"template": "none"} | keys), tokenizer)


@pytest.mark.parametrize(
    "record, keys, prompt",
    [
        ({"prompt": "Why?", **TEXTS}, {}, "Why?"),
        ({"question": "Why?", "system": "Be.", **TEXTS}, {}, "Be.\n\nWhy?"),
        ({"instruction": "Why?", "input": "Rain.", **TEXTS}, {}, "Why?\n\nRain."),
        ({"messages": [SYSTEM, ASKED], **TEXTS}, {}, "Be.\n\nWhy?"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, {}, "Why?"),
        # whole conversations beside the question, as UltraFeedback has them, and as the only place that has it
        (
            {
                "prompt": "Why?",
                "chosen": [ASKED, GOOD],
                "rejected": [ASKED, BAD],
                "messages": [ASKED, GOOD],
                "score": 1,
            },
            {},
            "Why?",
        ),
        ({"chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]}, {}, "Be.\n\nWhy?"),
        ({"system": "Be.", "prompt": "Why?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {}, "Be.\n\nWhy?"),
        ({"prompt": "Why?", "good": "So.", "bad": "Thus"}, {"chosen": "good", "rejected": "bad"}, "Why?"),
        ({"prompt": "Why?", "output": "So.", "rejected": "Thus"}, {"chosen": "output"}, "Why?"),
        ({"a": "Wh", "answer": "y", **TEXTS}, {"question": "{a}{answer}?", "prefix": "p: "}, "p: Why?"),
    ],
)
def test_every_form(byte, jsonl, record, keys, prompt):
    (pair,) = load(byte, jsonl(record), **keys)
    assert byte.decode(pair.chosen.prompt) == prompt and pair.rejected.prompt == pair.chosen.prompt
    assert pair.chosen.response == [*byte("So.").input_ids, byte.eos_token_id]
    assert pair.rejected.response == [*byte("Thus").input_ids, byte.eos_token_id]
    assert pair.key == pair.chosen.key == pair.rejected.key == 0


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "Why?", "chosen": "So."}, "no field rejected, which a pair needs; it has prompt, chosen"),
        ({"prompt": "Why?", "chosen": None, "rejected": "x"}, "no field chosen"),
        ({"prompt": "Why?", "chosen": " ", "rejected": "x"}, "chosen is empty"),
        ({"prompt": "Why?", "chosen": "x", "rejected": [{"role": "assistant", "content": ""}]}, "rejected is empty"),
        ({"prompt": "Why?", "chosen": 3, "rejected": "x"}, "chosen: expected text, found int"),
        ({"prompt": "Why?", "chosen": [ASKED], "rejected": [BAD]}, "chosen: the last message is of user"),
        (TEXTS, "expected instruction/output, .* or messages"),
        ({"chosen": [ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]}, "conversations before chosen and rejected differ"),
        (
            {"prompt": "When?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
            "chosen: the conversation before the answer is not the question",
        ),
        ({"prompt": "Why?", "completion": "Hm.", **TEXTS}, "another answer beside chosen and rejected, .*question"),
        ({"prompt": "Why?", **TEXTS, "rejected": [{**BAD, "weight": 0}]}, "rejected: the answer's weight is 0"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_named(byte, jsonl, record, message):
    path = jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}, record)
    with pytest.raises(DataError, match=f"{path}:2: .*{message}"):
        load(byte, path)


def test_what_is_too_long_or_alike_is_counted(byte, jsonl):
    path = jsonl(
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "much too long", "chosen": "b", "rejected": "c"},
        {"prompt": "cut", "chosen": "1234", "rejected": "1235"},  # alike as far as they are read
        {"prompt": "kept", "chosen": "123456", "rejected": "<|end|>"},
    )
    found = load(byte, path, max_prompt_length=4, max_response_length=3)
    assert (len(found), found.dropped_long, found.dropped_alike, found.typed) == (1, 1, 2, 1)
    (pair,) = found
    assert pair.key == 3 and byte.decode(pair.chosen.response) == "123"
    assert list(found.ids()) == [pair.chosen.prompt, pair.chosen.response, pair.rejected.response]
    with pytest.raises(DataError, match="data.pairs: no usable pair in .*: 2 are over max_prompt_length=3 .*of 2 are"):
        load(byte, path, max_prompt_length=3, max_response_length=3)
    with pytest.raises(DataError, match="data.pairs: no usable pair in .*data.jsonl$"):
        load(byte, jsonl())


def test_a_limit_counts_usable_pairs(byte, jsonl):
    records = [{"prompt": "a", "chosen": "b", "rejected": "bc"[n % 2]} for n in range(6)]
    assert [pair.key for pair in load(byte, jsonl(*records), limit=2)] == [1, 3]


def test_parquet_files_and_datasets(byte, tmp_path):
    from datasets import Dataset

    dataset = Dataset.from_list([{"prompt": "Why?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}])
    dataset.to_parquet(str(tmp_path / "data.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    for keys in (
        ParquetPairs(type="parquet", path=str(tmp_path / "data.parquet"), template="none"),
        HfPairs(type="hf", path=str(tmp_path / "saved"), template="none"),
    ):
        (pair,) = load_pairs(keys, byte)
        assert byte.decode(pair.rejected.response) == "Thus" + byte.eos_token


def test_both_answers_end_as_the_chat_template_ends_them(byte, jsonl):
    record = {"prompt": [SYSTEM, ASKED], "chosen": [GOOD], "rejected": [BAD]}
    (pair,) = load(byte, jsonl(record), template="chat")
    whole = [byte.apply_chat_template([SYSTEM, ASKED, answer], tokenize=False) for answer in (GOOD, BAD)]
    for text, one in zip(whole, (pair.chosen, pair.rejected), strict=True):
        assert text.startswith(byte.decode([*one.prompt, *one.response]))


def test_a_picture_is_shown_with_both_answers(tmp_path):
    processor = build_processor("llava")
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "what?", "image": "1.png", **TEXTS}))
    found = load(processor.tokenizer, str(tmp_path / "data.jsonl"), template="chat")
    (pair,) = found
    shown = processor.image_processor([picture(1)], return_tensors="pt")["pixel_values"]
    for one in (pair.chosen, pair.rejected):
        assert torch.equal(one.extras["pixel_values"], shown)
        assert one.prompt.count(processor.image_token_id) == 4
    assert found.pictured == 1
    with pytest.raises(DataError, match="data.pairs: its prompts show pictures"):
        require_shared_pictures({"data.pairs": found}, processor.tokenizer, [byte_tokenizer()])
