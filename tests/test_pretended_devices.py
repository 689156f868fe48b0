"""The pretended devices of tests refuse what real ones would, and nothing else."""

import pytest
import torch

from tests.pretended_devices import pretended_devices

THERE = torch.device("xpu:1")


@pytest.fixture(autouse=True)
def devices():
    with pretended_devices() as places:
        yield places


def test_a_tensor_is_where_it_was_put_and_so_is_what_is_made_of_it():
    one = torch.zeros(3, 2, device="xpu:1")
    made = [one[1:], one.new_zeros(2), torch.empty_like(one), one.t() @ one, one.to(torch.float64), one.sum()]
    assert {tensor.device for tensor in made} == {THERE}
    module = torch.nn.Linear(2, 2).to(THERE)
    assert module(one).device == module.weight.device == THERE
    assert {one.cpu().device.type, one.new_zeros(2, device="cpu").device.type, torch.zeros(2).device.type} == {"cpu"}
    assert torch.zeros(2).to(one).device == THERE
    assert torch.zeros(2).copy_(one[0]).device.type == "cpu"


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there[torch.tensor([0])],
        lambda here, there: here.sum().add_(there.sum()),
        lambda here, there: torch.mm(here, here, out=there),
        lambda here, there: torch.nn.Linear(2, 2)(there),
        lambda here, there: there + there.to("xpu:0"),
    ],
    ids=["add", "cat", "index", "number in place", "out", "module", "two of them"],
)
def test_two_devices_do_not_mix(mix):
    with pytest.raises(RuntimeError, match="mixes tensors on .* and xpu:1"):
        mix(torch.ones(2, 2), torch.ones(2, 2, device="xpu:1"))


def test_a_number_on_the_host_goes_with_any():
    assert (torch.ones(2, device="xpu:1") * torch.tensor(2.0)).cpu().tolist() == [2.0, 2.0]


def test_a_gradient_comes_back_to_where_its_tensor_is():
    weight = torch.ones(2, requires_grad=True)
    (weight.to("xpu:1") * torch.full((2,), 3.0, device="xpu:1")).sum().backward()
    assert weight.grad.device.type == "cpu" and weight.grad.tolist() == [3.0, 3.0]


def test_a_step_over_both_devices():
    modules = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to("xpu:1")]
    optimizer = torch.optim.AdamW([{"params": list(module.parameters())} for module in modules], fused=True)
    for module in modules:
        module(torch.ones(1, 2, device=module.weight.device)).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_([weight for module in modules for weight in module.parameters()], 1.0)
    optimizer.step()
    assert norm.item() == pytest.approx(12**0.5)
    assert optimizer.state[modules[1].weight]["exp_avg"].device == THERE


def test_a_device_is_forgotten_with_its_tensor(devices):
    before = len(devices.of_storage)
    one = torch.zeros(3, device="xpu:1")
    assert len(devices.of_storage) == before + 1
    del one
    assert len(devices.of_storage) == before


def test_a_tensor_elsewhere_has_no_array():
    with pytest.raises(TypeError, match="a tensor on xpu:1 has no array"):
        torch.zeros(3, device="xpu:1").numpy()
