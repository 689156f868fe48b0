"""The buffer's way to a file and back, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.rollout.buffer import Rollout, RolloutBuffer


def make_buffer(dtype=torch.bfloat16, lengths=(3, 1, 4)) -> RolloutBuffer:
    torch.manual_seed(0)
    return RolloutBuffer(
        Rollout(
            key=2**40 + place,
            prompt=list(range(place + 1)),
            response=[7] * length,
            ended=place % 2 == 0,
            vectors={"student_logprob": torch.randn(length), "advantage": torch.randn(length, dtype=torch.float64)},
            teacher={"hidden": torch.randn(length, 5).to(dtype)},
        )
        for place, length in enumerate(lengths)
    )


def assert_same(left: RolloutBuffer, right: RolloutBuffer) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.key, one.prompt, one.response, one.ended) == (other.key, other.prompt, other.response, other.ended)
        assert list(one.vectors) == list(other.vectors) or set(one.vectors) == set(other.vectors)
        for name, vector in one.vectors.items():
            assert vector.dtype == other.vectors[name].dtype and torch.equal(vector, other.vectors[name])
        assert one.teacher.keys() == other.teacher.keys()
        for name, tensor in one.teacher.items():
            assert tensor.dtype == other.teacher[name].dtype
            assert torch.equal(tensor, other.teacher[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip_through_a_file(tmp_path, dtype):
    buffer = make_buffer(dtype)
    save_file(buffer.state(), tmp_path / "buffer.safetensors")
    assert_same(RolloutBuffer.from_state(load_file(tmp_path / "buffer.safetensors")), buffer)


def test_empty_and_without_hidden_states(tmp_path):
    save_file(RolloutBuffer().state(), tmp_path / "buffer.safetensors")
    assert len(RolloutBuffer.from_state(load_file(tmp_path / "buffer.safetensors"))) == 0
    bare = RolloutBuffer([Rollout(1, [2, 3], [4], False)])
    assert_same(RolloutBuffer.from_state(bare.state()), bare)


def test_hidden_states_may_be_of_some_alone(tmp_path):
    """As on one of several ranks."""
    buffer = make_buffer()
    buffer[1].teacher = {}
    save_file(buffer.state(), tmp_path / "buffer.safetensors")
    assert_same(RolloutBuffer.from_state(load_file(tmp_path / "buffer.safetensors")), buffer)


def test_what_prompts_show_may_be_of_some_alone(tmp_path):
    """Two pictures, none and one: each answer gets back its own, of the dtype and shape they had."""
    buffer = make_buffer()
    shown = [torch.randn(2, 3, 4), None, torch.randn(1, 3, 4)]
    for rollout, pixels in zip(buffer, shown, strict=True):
        rollout.extras = (
            {} if pixels is None else {"pixel_values": pixels, "sizes": torch.tensor([[4, 3]] * len(pixels))}
        )
    save_file(buffer.state(), tmp_path / "buffer.safetensors")
    back = RolloutBuffer.from_state(load_file(tmp_path / "buffer.safetensors"))
    assert_same(back, buffer)
    for rollout, before in zip(back, buffer, strict=True):
        assert rollout.extras.keys() == before.extras.keys() == rollout.sequence.extras.keys()
        for name, tensor in rollout.extras.items():
            assert tensor.dtype == before.extras[name].dtype and torch.equal(tensor, before.extras[name])


def test_each_prompt_keeps_the_name_of_its_teacher():
    named = [Rollout(place, [1], [2, 3], True, judge=name) for place, name in enumerate(["math", None, "chat é"])]
    back = RolloutBuffer.from_state(RolloutBuffer(named).state())
    assert [one.judge for one in back] == ["math", None, "chat é"]
    assert back[0].sequence.judge == "math"
    assert not any(name.startswith("judge") for name in RolloutBuffer([named[1]]).state())


def test_is_a_sequence():
    buffer = make_buffer()
    assert [rollout.key - 2**40 for rollout in buffer] == [0, 1, 2] and buffer[-1].response == [7] * 4
    part = buffer[1:]
    assert isinstance(part, RolloutBuffer) and len(part) == 2 and part[0] is buffer[1]
    assert not RolloutBuffer()


def test_rollouts_that_do_not_fit_together():
    buffer = make_buffer()
    buffer[1].vectors["weight"] = torch.ones(1)
    with pytest.raises(ValueError, match="rollout .* holds student_logprob, advantage, weight"):
        buffer.state()
    buffer = RolloutBuffer([Rollout(1, [2], [3], True), make_buffer()[0]])
    with pytest.raises(ValueError, match="holds nothing, but .*|but the first one nothing"):
        buffer.state()
    buffer = make_buffer()
    buffer[2].vectors["advantage"] = torch.ones(3)
    with pytest.raises(ValueError, match="advantage has 3 rows for a response of 4 tokens"):
        buffer.state()
    buffer = make_buffer()
    buffer[2].teacher = {"hidden": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match="hidden has 3 rows for a response of 4 tokens"):
        buffer.state()


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_state_that_is_not_one(damage):
    state = make_buffer().state()
    if damage == "missing":
        del state["response_ids"]
    else:
        state["response_ids"] = state["response_ids"][:-1]
    with pytest.raises(ValueError, match="not the state of a rollout buffer"):
        RolloutBuffer.from_state(state)


def test_pictures_of_different_shapes_come_back_as_they_were():
    def rollout(**extras) -> Rollout:
        return Rollout(1, [1, 2], [3], True, {"a": torch.zeros(1)}, extras=extras)

    before = [
        rollout(pixels=torch.rand(1, 5, 3)),
        rollout(),
        rollout(pixels=torch.rand(2, 4, 2), sizes=torch.ones(2, 2)),
    ]
    after = RolloutBuffer.from_state(RolloutBuffer(before).state())
    for ours, theirs in zip(before, after, strict=True):
        assert ours.extras.keys() == theirs.extras.keys()
        assert all(torch.equal(ours.extras[name], theirs.extras[name]) for name in ours.extras)


def test_prompts_for_the_teacher_come_back(tmp_path):
    buffer = make_buffer()
    assert not [name for name in buffer.state() if "for_teacher" in name]
    buffer[1].teacher_prompt = [7, 8, 9]
    save_file(buffer.state(), tmp_path / "told.safetensors")
    again = RolloutBuffer.from_state(load_file(tmp_path / "told.safetensors"))
    assert_same(buffer, again)
    assert [one.teacher_prompt for one in again] == [None, [7, 8, 9], None]
    assert again[1].sequence.read_by_teacher().prompt == [7, 8, 9]
