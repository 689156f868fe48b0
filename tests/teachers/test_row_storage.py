"""Forms of stored rows against float64: what comes back, the likeliest ids, and the error that is stated."""

import pytest
import torch

from minillm.losses import LMHead, TopK, linear_token_stats
from minillm.teachers.row_storage import COMPARED, RowStorage, StorageError, likeliest

ROWS, HIDDEN, VOCABULARY = 40, 24, 97


@pytest.fixture
def hidden() -> torch.Tensor:
    """Rows of very different sizes, one of them 0, as last hidden states with outliers have them."""
    torch.manual_seed(0)
    rows = torch.randn(ROWS, HIDDEN) * torch.logspace(-2, 1, ROWS)[:, None]
    rows[3] = 0
    return rows


def heads():
    torch.manual_seed(1)
    weight, bias = torch.randn(VOCABULARY, HIDDEN) * 0.3, torch.randn(VOCABULARY)
    banned = bias.clone()
    banned[5] = -torch.inf
    return {
        "plain": LMHead(weight),
        "all": LMHead(weight, banned, logit_scale=0.7, softcap=4.0),
    }


def log_softmax(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:  # (N, H) -> (N, V), float64
    raw = hidden.double() @ head.weight.double().t() + (0 if head.bias is None else head.bias.double())
    z = raw * head.logit_scale
    if head.softcap is not None:
        z = torch.where(raw == -torch.inf, raw, head.softcap * torch.tanh(z / head.softcap))
    return z.log_softmax(-1)


@pytest.mark.parametrize("dtype, bound", [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11), ("int8", None)])
def test_hidden_states_come_back_to_the_rounding_of_their_form(hidden, dtype, bound):
    storage, head = RowStorage("hidden", dtype, HIDDEN), heads()["plain"]
    parts = storage.encode(hidden, head)
    assert sum(part[0].numel() * part.itemsize for part in parts.values()) == storage.bytes_per_row
    assert tuple(parts) == storage.parts
    found = storage.decode(parts, torch.float32)["hidden"]
    if bound is None:  # half a step of the row's own scale
        bound_of = hidden.abs().amax(1, keepdim=True) / 127 / 2 * 1.0001
        assert ((found - hidden).abs() <= bound_of).all() and parts["hidden"].dtype == torch.int8
    else:
        assert ((found - hidden).abs() <= bound * hidden.abs() + 1e-7 * (bound > 0)).all()
    assert not found[3].any()


@pytest.mark.parametrize("name", ["plain", "all"])
def test_the_likeliest_ids_are_those_of_full_logits(hidden, name):
    head = heads()[name]
    ids, logprobs = likeliest(hidden, head, 9)
    want = log_softmax(hidden, head).topk(9)
    rows = [row for row in range(ROWS) if row != 3 or name == "all"]  # without a bias the row of zeros is all ties
    assert torch.equal(ids[rows], want.indices[rows])
    assert torch.allclose(logprobs.double(), want.values, atol=2e-6)
    with pytest.raises(ValueError, match="k is 98, and the head has 97 rows"):
        likeliest(hidden, head, 98)
    everything = likeliest(hidden, head, VOCABULARY)[1]
    assert torch.allclose(everything.double().exp().sum(1), torch.ones(ROWS).double(), atol=1e-5)


def test_a_rows_own_id_is_always_there(hidden):
    head = heads()["all"]
    exact, plain = log_softmax(hidden, head), likeliest(hidden, head, 4)[0]
    own = torch.arange(ROWS) * 2 + 30  # up to 108: the head has 97 rows
    own[1] = plain[1, 2]
    ids, logprobs = likeliest(hidden, head, 4, own)
    for row in range(ROWS):
        expected = plain[row].tolist()
        if own[row] < VOCABULARY and own[row] not in expected:
            expected[-1] = own[row].item()
        assert ids[row].tolist() == expected, row
        assert torch.allclose(logprobs[row].double(), exact[row, ids[row]], atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_stated_error_is_that_of_the_rows(hidden, dtype):
    storage, head = RowStorage("hidden", dtype, HIDDEN), heads()["all"]
    error = StorageError()
    for chunk in hidden.split(15):  # as the batches of a shard
        error.add(storage, chunk, storage.encode(chunk, head), head)
    other = StorageError()
    other.merge(error)
    said = other.described()
    stored = storage.decode(storage.encode(hidden, head), torch.float32)["hidden"].double()
    wrong = stored - hidden.double()
    assert said["relative_rms"] == pytest.approx((wrong.norm() / hidden.double().norm()).item(), rel=1e-6)
    assert said["most"] == pytest.approx(wrong.abs().max().item())
    p, q = log_softmax(hidden, head), log_softmax(stored, head)
    divergence = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(1)
    assert said["rows"] == said["compared_rows"] == ROWS and COMPARED > 15
    assert said["forward_kl_nats_mean"] == pytest.approx(divergence.mean().item(), rel=0.02, abs=2e-7)
    assert said["forward_kl_nats_most"] == pytest.approx(divergence.max().item(), rel=0.02, abs=2e-7)
    assert said["forward_kl_nats_most"] > 1e-6


def test_what_likeliest_ids_leave_out_is_stated(hidden):
    storage, head = RowStorage("top_k", "float32", 4), heads()["plain"]
    error, parts = StorageError(), storage.encode(hidden, head)
    error.add(storage, hidden, parts, head)
    assert parts["ids"].dtype == torch.int32 and storage.bytes_per_row == 4 * 8
    tails = 1 - log_softmax(hidden, head).topk(4).values.exp().sum(1)
    said = error.described()
    assert said["tail_probability_mean"] == pytest.approx(tails.mean().item(), abs=1e-6)
    assert said["tail_probability_most"] == pytest.approx(tails.max().item(), abs=1e-6)
    assert said["largest_id"] == parts["ids"].max() and StorageError().described()["rows"] == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("k", [16, 90])
def test_rounded_log_probabilities_leave_the_other_ids_what_they_had(hidden, dtype, k):
    """Rounded to bfloat16, 90 of 97 ids add up to more than 1 in many rows, and the rest would be anything."""
    storage, head = RowStorage("top_k", dtype, k), heads()["plain"]
    parts = storage.encode(hidden, head)
    assert tuple(parts) == storage.parts
    assert sum(part[0].numel() * part.itemsize for part in parts.values()) == storage.bytes_per_row
    found, exact = storage.decode(parts, torch.float32), log_softmax(hidden, head)
    want = exact.gather(1, found["ids"])
    assert torch.allclose(found["logprobs"].double(), want, rtol=2 * torch.finfo(getattr(torch, dtype)).eps, atol=1e-2)
    tails = 1 - want.exp().sum(1)
    assert torch.allclose(1 - found["logprobs"].double().exp().sum(1), tails, atol=2e-6)

    student, labels = hidden.roll(1, 0), found["ids"][:, 0]
    told = linear_token_stats(student, head, TopK(**found), None, labels, fields=("forward_kl", "reverse_kl"))
    outcomes = [torch.cat((rows, torch.log1p(-rows.exp().sum(1, keepdim=True))), 1)
                for rows in (want, log_softmax(student, head).gather(1, found["ids"]))]  # fmt: skip
    known = tails > 1e-4  # of less than the rounding of fp32 nothing is known in any form
    assert known.sum() > ROWS / 2
    for name, (p, q) in {"forward_kl": outcomes, "reverse_kl": outcomes[::-1]}.items():
        divergence = (p.exp() * (p - q)).sum(1)
        assert torch.allclose(getattr(told, name)[known].double(), divergence[known], rtol=0.02, atol=0.01), name
