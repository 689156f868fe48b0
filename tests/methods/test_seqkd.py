"""Sequence-level distillation: the teacher writes an answer to every prompt once, before the first step."""

from minillm.methods import build_method
from minillm.rollout.rollouts import Sampling
from tests.methods.conftest import SHOWN


class Vocabulary:
    vocab_size = 300


def test_the_teacher_answers_every_prompt_as_configured(asked):
    one = asked(name="seqkd", temperature=0.25, rollout={"top_k": 4, "top_p": 0.75})
    items = build_method(one.config).collect(one.data, Vocabulary, draw=0)
    prompts = {
        tuple(prompt): key for call in one.calls for prompt, key in zip(call["prompts"], call["keys"], strict=True)
    }
    assert prompts == {(60, 61): 40, (61, 61): 41, (62, 61): 42}  # each once, in batches of two
    for call in one.calls:
        assert call["sampling"] == Sampling(9, 0.25, 4, 0.75)
        assert (call["seed"], call["who"], call["batch_size"]) == (7, "teacher", 2)
        assert call["extras"] == [SHOWN] * len(call["prompts"])
    assert [item.response for item in items] == [[item.key, 256] for item in items]
    assert [item.prompt for item in items] == [[item.key + 20, 61] for item in items] and len(items) == 5
    assert all(item.extras["pixel_values"] is SHOWN["pixel_values"] for item in items)
    assert one.told == [("the teacher writes", 2, 3), ("the teacher writes", 3, 3)]
    assert "time/rollout_s" in one.data.timing.read()


def test_answers_lie_in_the_folder_of_the_stage_and_serve_later_runs(asked):
    one = asked(name="seqkd")
    build_method(one.config).collect(one.data, Vocabulary, draw=0)
    assert (one.data.folder / "answers.jsonl").exists()
    before = len(one.calls)
    method = build_method(one.config)
    for draw in range(2):
        method.collect(one.data, Vocabulary, draw)
    assert len(one.calls) == before
