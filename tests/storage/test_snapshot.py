"""A copy of a state has nothing in common with it, and says the same."""

import torch

from minillm.storage.snapshot import SavedPart, copied_to_host


def test_nothing_of_the_original_is_in_the_copy():
    weight = torch.arange(6.0).view(2, 3).requires_grad_(True)
    state = {"a": [weight, (weight * 2, 7)], "b": {"c": torch.zeros(0), "d": None, "e": [1, "x"]}}
    copied = copied_to_host(state)
    with torch.no_grad():
        weight.zero_()
    state["a"][1][0].zero_()
    state["b"]["e"].append(2)
    expected = torch.arange(6.0).view(2, 3)
    assert torch.equal(copied["a"][0], expected) and torch.equal(copied["a"][1][0], 2 * expected)
    assert copied["a"][1][1] == 7 and copied["b"]["e"] == [1, "x"] and copied["b"]["d"] is None
    assert copied["b"]["c"].shape == (0,) and not copied["a"][0].requires_grad


def test_one_tensor_under_two_names_stays_one():
    weight = torch.randn(3, 2)
    copied = copied_to_host({"embed": weight, "head": weight.detach(), "turned": weight.T, "row": weight[:1]})
    assert copied["embed"].data_ptr() == copied["head"].data_ptr() != weight.data_ptr()
    assert torch.equal(copied["turned"], weight.T) and torch.equal(copied["row"], weight[:1])


def test_tensors_without_elements_keep_their_shapes():
    copied = copied_to_host([torch.zeros(0, 3), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)])
    assert [tuple(one.shape) for one in copied] == [(0, 3), (0, 5), (0,)] and copied[2].dtype == torch.int64


def test_dtypes_and_single_numbers_come_through():
    for dtype in (torch.bfloat16, torch.float64, torch.int8, torch.bool):
        tensor = torch.ones(3, dtype=dtype)
        assert torch.equal(copied_to_host(tensor), tensor) and copied_to_host(tensor).dtype == dtype
    assert copied_to_host(torch.tensor(3.0)).shape == ()


def test_a_part_that_is_copied_is_written_as_it_was(tmp_path):
    state = {"x": torch.zeros(2)}
    part = SavedPart(lambda: state, lambda found, folder: torch.save(found, folder / "x"))
    copied = part.copied()
    state["x"] += 1
    for one, value in ((copied, 0.0), (part, 1.0)):
        one.save(tmp_path)
        assert torch.load(tmp_path / "x")["x"].tolist() == [value] * 2
