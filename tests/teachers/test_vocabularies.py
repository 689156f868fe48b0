"""Ids that two tokenizers share by use: what may differ, what is refused by name, and texts with what is not shared."""

import json

import pytest
import torch
import yaml
from tokenizers import AddedToken

from minillm import UserError
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.teachers.local import LocalTeacher
from minillm.teachers.preflight import preflight
from minillm.teachers.vocabularies import PreflightError
from tests.runs import train

CPU = torch.device("cpu")
RESERVED = ("<|reserved_0|>", "<|reserved_1|>")


def with_tokens(*names, **named):
    """The byte tokenizer, with special tokens from id 257 on."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    for name, token in named.items():
        setattr(tokenizer, name, token)
    return tokenizer


@pytest.fixture
def look(build_model):
    """A function from two tokenizers (and head rows) to the pair as models, and the row of what is not shared."""

    def look(ours, theirs, rows=(260, 260)):
        student, teacher = (build_model("llama", vocab_size=size, eos_token_id=256) for size in rows)
        models, table = preflight(student, LocalTeacher(teacher), ours, theirs, CPU)
        return models, {name: (mine, other) for name, mine, other in table}.get("ids not shared")

    return look


def test_an_id_beyond_the_head_that_nothing_encodes_to(look):
    """Gemma 3 1B: 262,145 tokens above 262,144 rows; the last one stands for pictures, which this model does not see."""
    names = ("<image_soft_token>",)
    models, unshared = look(with_tokens(*names), with_tokens(*names), rows=(257, 257))
    assert models.vocab_size == 257 and unshared == ("1: '<image_soft_token>'",) * 2
    models.require_shared("data.prompts", [[1, 2, 256]])
    with pytest.raises(
        UserError, match=r"data\.prompts: a text holds id 257, which has no row in the models' heads, 257"
    ):
        models.require_shared("data.prompts", [[1, 2], [3, 257]])


def test_a_padding_id_beyond_the_head_is_not_used(look):
    tokenizers = [with_tokens("<pad>", pad_token="<pad>") for _ in range(2)]
    models, _ = look(*tokenizers, rows=(257, 257))
    assert models.pad_id == 256


def test_reserved_tokens_of_other_names(look):
    """Llama 3 and 3.1: <|reserved_special_token_3|> and <|eom_id|>."""
    models, unshared = look(with_tokens(*RESERVED), with_tokens(RESERVED[0], "<|eom_id|>"))
    assert models.vocab_size == 260 and unshared == ("1: '<|reserved_1|>'", "1: '<|eom_id|>'")
    with pytest.raises(
        UserError, match=r"id 258, which is '<\|reserved_1\|>' for the student and '<\|eom_id\|>' for the"
    ):
        models.require_shared("data.corpus", [[258]])


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_tokens_added_to_one_of_them_are_cut_away(look, larger):
    """Qwen 2 and 2.5 with heads of the same 151,936 rows."""
    few, many = with_tokens(RESERVED[0]), with_tokens(RESERVED[0], "<tool_call>", "</tool_call>")
    pair = (many, few) if larger == "student" else (few, many)
    models, unshared = look(*pair)
    assert models.vocab_size == 258
    shown = ("2: '<tool_call>', '</tool_call>'", "2 ids, not there")
    assert unshared == (shown if larger == "student" else shown[::-1])
    for model in (models.student, models.teacher.model):  # all that it would say
        with torch.no_grad():
            model.lm_head.weight[258:] = 50 * model.lm_head.weight[:2]
            model.lm_head.weight[:258] *= 0.01
    for who in ("student", "teacher"):
        answers = LocalRollouts(models).sample(
            [[65, 66]] * 4, Sampling(8), keys=list(range(4)), seed=0, draw=0, who=who, batch_size=4
        )
        assert all(token < 258 for answer in answers for token in answer.response)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_end_that_only_one_of_them_has(look, who):
    usual, chat = with_tokens(), with_tokens("<|im_end|>", eos_token="<|im_end|>")
    pair = (chat, usual) if who == "student" else (usual, chat)
    with pytest.raises(PreflightError, match=rf"id 257 is .*<\|im_end\|>.*, and ends answers of the {who}"):
        look(*pair)


def test_a_tail_that_no_head_holds_is_told_apart_from_the_models_of_another_tokenizer(look):
    with pytest.raises(
        PreflightError, match=r"257 tokens, but the heads share only 200 rows \(student 260, teacher 200\)"
    ):
        look(with_tokens(), with_tokens(), rows=(260, 200))
    with pytest.raises(PreflightError, match=r"the heads share only 257 rows"):
        chat = with_tokens("<|im_end|>", eos_token="<|im_end|>")
        look(chat, chat, rows=(257, 257))


def test_a_run_with_a_teacher_of_a_later_release(build_model, small_run, tmp_path):
    """And what is said where its data holds a token that the teacher does not know."""
    for name, added, size in (("student", 3, 260), ("teacher", 1, 258)):
        tokenizer = with_tokens(*(f"<tool_{number}>" for number in range(added)))
        model = build_model("llama", vocab_size=size, eos_token_id=256, max_position_embeddings=64)
        save_model(model, tokenizer, tmp_path / name)
    document = small_run(tmp_path, layers=1)
    document["student"] = {"path": str(tmp_path / "student")}
    document["teacher"] = {"path": str(tmp_path / "teacher")}
    document["method"] = {"name": "gkd"}
    document["train"]["max_steps"] = 1
    del document["eval"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))
    train(recipe)
    record = {"prompt": "say <tool_2>", "completion": "so"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(
        UserError, match=r"data\.prompts: a text holds id 259, which is '<tool_2>' for the student and nothing"
    ):
        train(recipe, f"output_dir={tmp_path / 'other'}", "data.prompts.special_tokens=tokens")
    train(recipe, f"output_dir={tmp_path / 'text'}")
