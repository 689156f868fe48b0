"""The GPU's path at the size of the benchmark, on meta tensors: what is alive at a time, and that nothing is waited for.

Meta tensors have shapes and no memory. What reads a number of one, as a synchronisation with a GPU would, raises.
"""

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minillm.benchmarks.goals import LARGE, LONG  # noqa: E402
from minillm.benchmarks.providers import LEAN  # noqa: E402
from minillm.kernels import (  # noqa: E402
    head,
    rows_triton,
    sparse_teacher_triton,
    tile_sums_triton,
    tiled_triton,
)
from minillm.kernels.chunks import chunk_rows  # noqa: E402
from minillm.kernels.divergences import DIVERGENCES, FIELDS  # noqa: E402
from minillm.kernels.share_sums import SHARED_FIELDS  # noqa: E402
from minillm.kernels.sparse_teacher import SAYABLE  # noqa: E402
from minillm.losses import (  # noqa: E402
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_objective,
    linear_token_stats,
)
from minillm.planning.ledger import Ledger  # noqa: E402
from minillm.planning.loss import LossShape, LossTwin  # noqa: E402
from tests.kernels.live import Live  # noqa: E402

GIB = 2**30
BACKENDS = ("torch", "triton")
EIGHT = tuple(name for name in FIELDS if name in SHARED_FIELDS)


class Unlaunched:
    """In the place of a kernel: there is nothing for it to read."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    def on_tensor_cores(dtype, logits, device):
        return dtype in (torch.bfloat16, torch.float16) and logits == torch.float32

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # or the door would ask for CUDA tensors
    monkeypatch.setattr(head, "_on_tensor_cores", on_tensor_cores)
    names = ("statistics_kernel", "gradient_kernel", "both_kernel", "add_softcapped_kernel", "softcap_gradient_kernel")
    for name in names:
        monkeypatch.setattr(rows_triton, name, Unlaunched())
    monkeypatch.setattr(sparse_teacher_triton, "tail_kernel", Unlaunched())
    monkeypatch.setattr(tiled_triton, "tiled_kernel", Unlaunched())
    monkeypatch.setattr(tile_sums_triton, "tile_sums_kernel", Unlaunched())
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())


def tensors(case):
    def empty(*shape, leaf=False):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=leaf)

    student = (
        empty(case.tokens, case.student_hidden, leaf=True),
        empty(case.vocab, case.student_hidden, leaf=True),
    )
    teacher = empty(case.tokens, case.teacher_hidden), empty(case.vocab, case.teacher_hidden)
    return *student, *teacher, torch.empty(case.tokens, dtype=torch.int64, device="meta")


def gib_over_inputs(case, **options) -> tuple[float, float]:
    """The peak of a forward and backward pass, and of it the gradients."""
    *arguments, labels = tensors(case)
    with Live() as live:
        linear_divergence(*arguments, labels=labels, kept=case.tokens, **options).backward()
    return live.peak / GIB, sum(leaf.grad.nbytes for leaf in arguments[:2]) / GIB


def test_the_memory_goals_of_the_benchmark():
    """Allocations of tensors alone: a GPU's workspaces come on top."""
    peak, gradients = gib_over_inputs(LARGE, backend="triton")
    assert 2.2 < peak < 2.45, peak  # a goal of 2.5
    assert gib_over_inputs(LARGE, backend="triton", **LEAN)[0] < 1.3  # of 1.4
    longer, more = gib_over_inputs(LONG, backend="triton")
    assert abs(longer - more - (peak - gradients)) < 0.05 * (peak - gradients)
    tiled, gradients = gib_over_inputs(LARGE, backend="tiled")
    assert tiled - gradients < 0.09, tiled - gradients  # of 0.1


def test_scoring_holds_a_chunk_of_logits_or_none():
    *arguments, labels = tensors(LARGE)
    for backend, most in (("triton", 1.25), ("tiled", 0.02)):
        with torch.no_grad(), Live() as live:
            linear_token_stats(*arguments, labels, kept=LARGE.tokens, backend=backend)
        assert live.peak / GIB < most, (backend, live.peak / GIB)


@pytest.mark.parametrize("kept", [LARGE.tokens, LARGE.tokens // 2])
def test_a_plan_counts_what_the_loss_holds(kept):
    """The twin that `minillm plan` runs in its place, for a GPU."""
    hidden, weight, *teacher, labels = tensors(LARGE)
    with Live() as real:
        linear_divergence(hidden, weight, *teacher, labels=labels, kept=kept, backend="triton").backward()
    hidden, weight, *_ = tensors(LARGE)
    shape = LossShape(kept, LARGE.vocab, 2, torch.device("cuda"))
    with Live() as twin:
        LossTwin.apply(hidden, weight, torch.bfloat16, shape, Ledger()).backward()
    assert twin.peak == pytest.approx(real.peak, rel=0.03)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_call_waits_for_the_device_where_the_count_is_known(backend):
    case = LARGE
    *arguments, labels = tensors(case)
    known = dict(kept=case.tokens // 2, backend=backend)
    calls = {
        "logprobs": lambda: linear_logprobs(*arguments[:2], labels, **known).sum(),
        "cross_entropy": lambda: linear_cross_entropy(*arguments[:2], labels, num_items=labels[0], **known),
        "token_stats": lambda: sum(
            getattr(linear_token_stats(*arguments, labels, fields=FIELDS, **known), name).sum()
            for name, field in FIELDS.items()
            if field.differentiable
        ),
        "objective": lambda: linear_objective(
            *arguments, labels, lambda stats, w: w * stats.jsd, inputs={"w": labels}, fields=("jsd",), **known
        )[0],
        **{
            name: lambda name=name: linear_divergence(*arguments, labels=labels, divergence=name, **known)
            for name in DIVERGENCES
        },
        "coupled": lambda: linear_objective(
            *arguments,
            labels,
            lambda stats, w: (w * stats.interpolated_cross_entropy).sum().square(),
            inputs={"w": labels},
            fields=("interpolated_cross_entropy",),
            coupled=True,
            **known,
        )[0],
        "sum of heads": lambda: linear_cross_entropy(
            (arguments[0], arguments[2]),
            LMHead.sum_of(LMHead(arguments[1], softcap=30.0), LMHead(arguments[3], logit_scale=0.5)),
            labels,
            **known,
        ),
        "no labels": lambda: linear_divergence(*arguments, backend=backend),
    }
    for name, call in calls.items():
        for leaf in arguments[:2]:
            leaf.grad = None
        call().backward()
        assert all(leaf.grad is not None for leaf in arguments[:2]), name


@pytest.mark.parametrize(("template_softcap", "delta_softcap", "buffers"), [(30.0, None, 1), (None, 30.0, 2)])
def test_a_sum_of_heads_holds_the_logits_of_one_model(template_softcap, delta_softcap, buffers):
    """And of every capped summand that is trained, whose slope the gradient reads; within the same bytes of logits."""
    hidden, weight, other_hidden, other_weight, labels = tensors(LARGE)
    head = LMHead.sum_of(LMHead(other_weight, softcap=template_softcap), LMHead(weight, softcap=delta_softcap))
    with Live() as live:
        linear_cross_entropy(
            (other_hidden, hidden), head, labels, kept=LARGE.tokens, backend="triton", chunk_bytes=2**30
        ).backward()
    assert other_hidden.grad is None and other_weight.grad is None
    weight_sum = 4 * weight.numel()
    rows = chunk_rows(LARGE.tokens, LARGE.vocab, models=buffers, itemsize=4, device=hidden.device, chunk_bytes=2**30)
    logits = 4 * rows * LARGE.vocab * buffers
    half = 0 if buffers == 1 else 2 * rows * LARGE.vocab  # the capped summand's gradient as its products want it
    small = 2 * hidden.nbytes + 2 * rows * (8 * hidden.shape[1] + other_hidden.shape[1])
    assert logits < live.peak - weight_sum - half < logits + small


def test_the_tiled_engine_does_not_wait_either():
    *arguments, labels = tensors(LARGE)
    stats = linear_token_stats(*arguments, labels, fields=EIGHT, kept=LARGE.tokens // 2, backend="tiled")
    (stats.reverse_kl + stats.forward_kl - stats.student_logprob + stats.student_entropy).sum().backward()
    assert all(leaf.grad is not None for leaf in arguments[:2])


@pytest.mark.parametrize("backend", (*BACKENDS, "tiled"))
def test_counting_is_the_one_thing_that_waits(backend, monkeypatch):
    """Where the count is not passed, it and the range check come over in one transfer."""
    waited = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waited.append(tensor.shape) or [LARGE.tokens // 2, 0])
    *arguments, labels = tensors(LARGE)
    linear_divergence(*arguments, labels=labels, backend=backend).backward()
    assert waited == [(2,)]


def with_top_k(case, k=64):
    """The student's tensors, a TopK and the labels."""
    hidden, weight, *_, labels = tensors(case)
    ids = torch.empty(case.tokens, k, dtype=torch.int32, device="meta")
    return hidden, weight, TopK(ids, torch.empty(case.tokens, k, device="meta")), None, labels


def test_a_top_k_costs_the_student_alone_and_a_few_vectors_more():
    """A chunk of the student's logits, as many bytes as of both models'; the sum of the weight's gradient; gradients."""
    *arguments, labels = with_top_k(LARGE)
    with Live() as live:
        linear_divergence(*arguments, labels=labels, kept=LARGE.tokens, backend="triton").backward()
    dense, _ = gib_over_inputs(LARGE, backend="triton")
    assert live.peak / GIB < dense + 0.03, (live.peak / GIB, dense)
    peaks = []
    for chunk_bytes in (2**28, 2**29):  # of what a chunk holds, logits are nearly all
        *arguments, labels = with_top_k(LARGE)
        with torch.no_grad(), Live() as live:
            linear_token_stats(*arguments, labels, kept=LARGE.tokens, backend="triton", chunk_bytes=chunk_bytes)
        peaks.append(live.peak)
        assert live.peak < 1.05 * chunk_bytes + 2**26
    assert peaks[1] - peaks[0] < 1.05 * 2**28


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_top_k_is_not_waited_for_where_the_count_is_known(backend):
    *arguments, labels = with_top_k(LARGE)
    known = dict(kept=LARGE.tokens // 2, backend=backend)
    differentiable = [name for name in SAYABLE if FIELDS[name].differentiable]
    calls = {
        "token_stats": lambda: sum(
            getattr(linear_token_stats(*arguments, labels, fields=SAYABLE, **known), name).sum()
            for name in differentiable
        ),
        "objective": lambda: linear_objective(
            *arguments, labels, lambda stats, w: w * stats.jsd, inputs={"w": labels}, fields=("jsd",), **known
        )[0],
        "divergence": lambda: linear_divergence(*arguments, labels=labels, **known),
        "no labels": lambda: linear_divergence(*arguments, kept=LARGE.tokens, backend=backend),
    }
    for name, call in calls.items():
        for leaf in arguments[:2]:
            leaf.grad = None
        call().backward()
        assert all(leaf.grad is not None for leaf in arguments[:2]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_checks_of_a_top_k_come_over_with_the_count(backend, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waited.append(tensor.shape) or [LARGE.tokens // 2, 0])
    *arguments, labels = with_top_k(LARGE)
    linear_divergence(*arguments, labels=labels, backend=backend).backward()
    assert waited == [(6,)]  # the count, labels and four rules
    linear_token_stats(*arguments, labels, fields=("teacher_logprob",), backend=backend)
    assert waited[1:] == [(7,)]
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waited.append(tensor.shape) or [0] * 4)
    linear_divergence(*arguments, backend=backend).backward()
    assert waited[2:] == [(4,)]
