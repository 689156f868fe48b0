"""The path of half precision on a GPU: fp32 logits by tensor cores, the logits' gradient in half precision.

A CPU has no such products; here they are made of fp32 ones, so that all that stands around them is run: the gradient
that takes the place of its logits, rows of padded lengths, sums in fp32 and where they are rounded.
"""

import pytest
import torch

from minillm.kernels import head, reference
from minillm.losses import LMHead, linear_cross_entropy, linear_divergence, linear_objective, linear_token_stats

pytest.importorskip("triton", reason="triton is not installed")

BACKENDS = ("torch", "triton", "tiled")
HALF = (torch.bfloat16, torch.float16)


def _wide(product):
    """torch.mm or torch.addmm with out_dtype, as CUDA has it."""

    def run(*operands, out_dtype=None, out=None, **scale):
        if out_dtype is None:
            return product(*operands, **scale) if out is None else product(*operands, out=out, **scale)
        left, right = operands[-2:]
        assert left.dtype == right.dtype and left.dtype in HALF and out_dtype == torch.float32
        result = product(*(one.to(out_dtype) for one in operands), **scale)
        return result if out is None else out.copy_(result)

    return run


@pytest.fixture
def tensor_cores(kit, monkeypatch):
    if kit.device == "cpu":

        def on_tensor_cores(dtype, logits, device):
            return dtype in HALF and logits == torch.float32

        monkeypatch.setattr(head, "_on_tensor_cores", on_tensor_cores)
        monkeypatch.setattr(torch, "mm", _wide(torch.mm))
        monkeypatch.setattr(torch, "addmm", _wide(torch.addmm))


def losses(case, backend, **options):
    """The sum of the reverse KL and something of the label: by an objective, by statistics; and one divergence's sum."""
    options |= {"backend": backend, "vocab_size": case.vocab_size}
    fields = ("reverse_kl", "student_logprob")

    def loss(stats):
        return stats.reverse_kl - 0.3 * stats.student_logprob

    found = {"token_stats": lambda: loss(linear_token_stats(*case.arguments, fields=fields, **options)).sum()}
    pair = case.arguments[:4]
    found["sum"] = lambda: linear_divergence(*pair, labels=case.labels, reduction="sum", **options)
    if backend != "tiled":
        found["objective"] = lambda: linear_objective(*case.arguments, loss, fields=fields, **options)[0]
    return found


@pytest.mark.parametrize("weight_grad", ["fp32", "bf16", "tensor"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, dtype, weight_grad, kit, tensor_cores):
    """An odd vocabulary, several chunks, and ids beyond those in use."""
    case = kit.make_case(rows=20, vocab=1003, hidden=24, teacher_hidden=40, dtype=dtype, bias=True, vocab_size=1001)
    expected, leaves = kit.oracle(case)
    both = (expected["reverse_kl"] - 0.3 * expected["student_logprob"]).sum()
    exact = {
        "both": torch.autograd.grad(both, list(leaves.values()), retain_graph=True),
        "sum": torch.autograd.grad(expected["reverse_kl"].sum(), list(leaves.values())),
    }
    values = {"both": both.item(), "sum": expected["reverse_kl"].sum().item()}
    for name in losses(case, backend):
        main = torch.zeros_like(case.student_weight, dtype=torch.float32, requires_grad=False)
        options = {"weight_grad": main if weight_grad == "tensor" else weight_grad, "chunk_bytes": 8 * 1001 * 5}
        loss = losses(case, backend, **options)[name]()
        of = "sum" if name == "sum" else "both"
        assert loss.item() == pytest.approx(values[of], rel=1e-5)
        for leaf in case.leaves.values():
            leaf.grad = None
        loss.backward()
        for (what, leaf), wanted in zip(case.leaves.items(), exact[of], strict=True):
            into = weight_grad == "tensor" and what == "weight"
            gradient = main if into else leaf.grad
            assert gradient.dtype == (torch.float32 if into else dtype)
            tolerance = 2e-2 if (weight_grad, what) == ("bf16", "weight") else 5e-3
            assert kit.relative_error(gradient, wanted) < tolerance, (name, what)


@pytest.mark.parametrize("factor", [1e-5, 1.0, 3e5])
@pytest.mark.parametrize("weight_grad", ["fp32", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_mean_fit_into_half_precision(backend, weight_grad, factor, kit, tensor_cores):
    """fp16 products of leaves in fp32, as under autocast, where tensor cores take the logits' gradient in fp16."""
    case = kit.make_case(rows=16, vocab=300, bias=True)
    rounded = case.with_(
        **{
            name: getattr(case, name).detach().half()
            for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
        }
    )
    expected, leaves = kit.oracle(rounded)
    exact = torch.autograd.grad(factor * expected["reverse_kl"].sum(), list(leaves.values()))
    main = torch.zeros_like(case.student_weight, requires_grad=False)
    with torch.autocast(kit.device, torch.float16):
        options = {
            "fields": ("reverse_kl",),
            "backend": backend,
            "weight_grad": main if weight_grad == "tensor" else "fp32",
        }
        loss = factor * linear_token_stats(*case.arguments, **options).reverse_kl.sum()
    loss.backward()
    found = dict(case.leaves, weight=main) if weight_grad == "tensor" else case.leaves
    for (name, leaf), wanted in zip(found.items(), exact, strict=True):
        gradient = leaf if leaf is main else leaf.grad
        assert kit.relative_error(gradient, wanted) < 3e-3, name


ENTRIES = [
    *((backend, entry) for backend in ("torch", "triton") for entry in ("mean", "none", "objective", "coupled")),
    *(("tiled", entry) for entry in ("mean", "none")),
]


@pytest.mark.parametrize(("backend", "entry"), ENTRIES)
def test_the_small_gradient_of_close_models_fits_into_fp16(backend, entry, kit, tensor_cores):
    """A reverse KL of 3e-5 over 1,000 ids, whose logits' gradients are around 1e-5: as exact as bf16 and better."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator) for rows in (32, 1000))
    teacher = 0.02 * (weight + 0.05 * torch.randn(1000, 64, generator=generator))
    hidden, weight, teacher = (one.half().to(kit.device) for one in (hidden, 0.02 * weight, teacher))
    leaves = [one.double().requires_grad_() for one in (hidden, weight)]
    log_q = (leaves[0] @ leaves[1].t()).log_softmax(-1)
    log_p = (hidden.double() @ teacher.double().t()).log_softmax(-1)
    wanted = torch.autograd.grad(2.0**16 * (log_q.exp() * (log_q - log_p)).sum(-1).mean(), leaves)
    pair = (hidden.requires_grad_(), weight.requires_grad_(), hidden.detach(), teacher)
    if entry in ("mean", "none"):
        loss = linear_divergence(*pair, reduction=entry, backend=backend).mean()
    else:
        options = dict(fields=("reverse_kl",), coupled=entry == "coupled", backend=backend, chunk_bytes=8 * 1000 * 20)
        loss = linear_objective(*pair, None, lambda stats: stats.reverse_kl, **options)[0] / 32
    for found, one in zip(torch.autograd.grad(2.0**16 * loss, (hidden, weight)), wanted, strict=True):
        assert kit.relative_error(found, one) < 5e-4


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("frozen", [(), (0,)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_sum_of_heads(backend, softcap, frozen, dtype, kit, tensor_cores):
    """A template in half precision and a delta in half precision or fp32, an odd vocabulary, several chunks."""
    template = kit.make_case(rows=20, vocab=1001, hidden=24, dtype=dtype, bias=True)
    for delta_dtype in (dtype, torch.float32):
        delta = kit.make_case(rows=20, vocab=1001, hidden=12, dtype=delta_dtype, bias=True, seed=1)
        cases, options = (template, delta), ({"softcap": softcap}, {"logit_scale": 0.7})
        parts = [list(case.leaves.values()) for case in cases]
        doubled = [list(case.doubled().leaves.values()) for case in cases]
        kept = template.kept
        z = sum(
            reference.logits(hidden[kept], weight, bias, **one)
            for (hidden, weight, bias), one in zip(doubled, options, strict=True)
        )
        loss64 = -z.log_softmax(-1).gather(1, template.labels[kept, None]).mean()
        for index in frozen:
            parts[index] = [leaf.detach() for leaf in parts[index]]
        head = LMHead.sum_of(*(LMHead(*part[1:], **one) for part, one in zip(parts, options, strict=True)))
        loss = linear_cross_entropy(
            tuple(part[0] for part in parts), head, template.labels, backend=backend, chunk_bytes=12 * 1001 * 5
        )
        assert loss.item() == pytest.approx(loss64.item(), rel=1e-5)
        trained = [index for index in (0, 1) if index not in frozen]
        found = torch.autograd.grad(loss, [leaf for index in trained for leaf in parts[index]])
        exact = torch.autograd.grad(loss64, [leaf for index in trained for leaf in doubled[index]])
        for one, wanted in zip(found, exact, strict=True):
            assert kit.relative_error(one, wanted) < 5e-3
