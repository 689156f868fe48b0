"""The GEMMs of a chunk: fp32 whatever the inputs, a tile at a time, and none that nobody needs."""

import pytest
import torch

from minillm.kernels import head as head_module
from minillm.kernels.head import HeadGradients, add_product, project, rounded

HALF = torch.bfloat16, torch.float16
CASES = [(torch.float32, torch.float32), *((dtype, dtype) for dtype in HALF), (torch.float32, torch.bfloat16)]


@pytest.fixture(params=[4096, 7])
def tile_rows(request, monkeypatch):
    monkeypatch.setattr(head_module, "WEIGHT_TILE_ROWS", request.param)


def numbers(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*size, generator=generator).to(dtype) for size in ((6, 8), (30, 8), (30,), (6, 30)))


@pytest.mark.parametrize(("dtype", "compute"), CASES)
def test_projection_rounds_its_inputs_and_nothing_else(dtype, compute, tile_rows):
    hidden, weight, bias, _ = numbers(dtype)
    out = torch.empty(6, 40)[:, :30]
    project(hidden.to(compute), weight, bias, compute, out)
    exact = hidden.to(compute).double() @ weight.to(compute).double().t() + bias.double()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "compute"), CASES)
@pytest.mark.parametrize("accumulation", [torch.float32, "tensor"])
def test_gradients_add_up_over_chunks(dtype, compute, accumulation, tile_rows):
    hidden, weight, bias, dz = numbers(dtype)
    dz = dz.float()
    start = torch.ones_like(weight, dtype=torch.float32)
    sums = HeadGradients(
        hidden,
        weight,
        bias,
        needs=(True, True, True),
        compute=compute,
        logits=torch.float32,
        vocab_size=30,
        accumulation=start if accumulation == "tensor" else accumulation,
    )
    assert sums.dz_dtype == torch.float32
    sums.add(dz[:4], hidden[:4].to(compute), slice(0, 4))
    sums.add(dz[4:], hidden[4:].to(compute), torch.tensor([4, 5]))
    exact = {
        "hidden": dz.double() @ weight.to(compute).double(),
        "weight": dz.double().t() @ hidden.to(compute).double(),
        "bias": dz.double().sum(0),
    }
    if accumulation == "tensor":
        torch.testing.assert_close(start.double() - 1, exact.pop("weight"), rtol=1e-5, atol=1e-5)
    for name, value in exact.items():
        tolerance = 1e-2 if name == "hidden" and dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(getattr(sums, name).double(), value, rtol=tolerance, atol=tolerance)


def test_what_is_not_needed_is_not_computed():
    hidden, weight, _, dz = numbers(torch.float32)
    sums = HeadGradients(
        hidden,
        weight,
        None,
        needs=(True, False, False),
        compute=torch.float32,
        logits=torch.float32,
        vocab_size=30,
        accumulation=torch.float32,
    )
    sums.add(dz, hidden, slice(0, 6))
    assert sums.weight is None and sums.bias is None and sums.hidden.abs().sum() > 0


@pytest.mark.parametrize("vocab_size", [20, 30])
def test_without_a_chunk_the_weight_has_a_gradient_of_zero(vocab_size):
    """And ids that are not in use have one in any case: their memory is not that of the first product."""
    hidden, weight, _, dz = numbers(torch.float32)
    options = dict(needs=(False, True, False), compute=torch.float32, logits=torch.float32, vocab_size=vocab_size)
    for chunks in (0, 1, 2):
        sums = HeadGradients(hidden, weight, None, **options, accumulation=torch.float32)
        sums._weight[:vocab_size] = torch.nan  # whatever was in that memory
        for _ in range(chunks):
            sums.add(dz[:, :vocab_size], hidden, slice(0, 6))
        assert (sums.weight[vocab_size:] == 0).all()
        torch.testing.assert_close(sums.weight[:vocab_size], chunks * (dz[:, :vocab_size].t() @ hidden))


@pytest.mark.parametrize("total_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_added_or_take_the_place_of_what_was_there(dtype, total_dtype, tile_rows):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*size, generator=generator).to(dtype) for size in ((20, 6), (6, 5)))
    exact = left.double() @ right.double()
    total = torch.full((20, 5), torch.nan, dtype=total_dtype)
    tolerance = 1e-5 if torch.bfloat16 not in (dtype, total_dtype) and dtype == torch.float32 else 2e-2
    for count in (1, 2):
        add_product(total, left, right, first=count == 1)
        torch.testing.assert_close(total.double(), count * exact, rtol=tolerance, atol=tolerance)


def test_a_factor_comes_before_the_one_rounding():
    total = torch.tensor([1e-9, 3.0])  # 1e-9 is 0 in fp16
    found = rounded(total, torch.tensor(4096.0), torch.float16)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, torch.tensor([4.096e-6, 12288.0]).half(), rtol=0, atol=0)
    assert torch.equal(rounded(total, None, torch.float16), total.half())
    assert rounded(None, torch.tensor(2.0), torch.float16) is None
