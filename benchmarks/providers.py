"""All that compute a loss: this library's backends, plain torch, the bare matrix products, and the peers of `peers`.

A provider is a function that takes the inputs of a case and returns a call: the mean loss over kept tokens, a scalar
with a graph. It raises Unavailable with the reason where it is not installed, or computes another loss, or cannot run
on the device. Providers that do not drop ignored rows themselves get the kept rows, as their own trainers do it.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minillm import losses
from minillm.benchmarks.cases import IGNORED, Inputs
from minillm.benchmarks.peers import PEERS, Call, Unavailable
from minillm.kernels.chunks import chunk_rows, logits_buffer

CHECKPOINT_ROWS = 256
LEAN = dict(weight_grad="bf16", chunk_bytes=640 * 2**20)  # half the logits and half the sum of the defaults
YARDSTICK = "matmuls"
FULL_LOGITS = "full_logits"  # computes no loss: runs where it is asked for


def _ours(backend: str, inputs: Inputs, **options: object) -> Call:
    case = inputs.case
    student = inputs.student_hidden, inputs.student_weight
    teacher = (inputs.top_k, None) if case.top_k else (inputs.teacher_hidden, inputs.teacher_weight)
    if backend != "torch" and student[0].device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    # kept: how many labels count, which a trainer knows from its batch
    labels = dict(labels=inputs.labels, ignore_index=IGNORED, kept=case.kept, backend=backend, **options)
    if case.loss == "cross_entropy":
        return lambda: losses.linear_cross_entropy(*student, **labels)
    if case.loss == "minillm":
        if backend == "tiled":
            raise Unavailable("backend='tiled' has no linear_objective")

        def objective(stats: losses.TokenStats, advantages: Tensor) -> Tensor:
            return stats.reverse_kl - advantages * stats.student_logprob

        def run() -> Tensor:
            total, _ = losses.linear_objective(
                *student,
                *teacher,
                objective=objective,
                inputs={"advantages": inputs.advantages},
                fields=("student_logprob", "reverse_kl"),
                **labels,
            )
            return total / case.kept

        return run
    if backend == "tiled" and case.top_k:
        raise Unavailable("backend='tiled' takes no top-k teacher")
    if backend == "tiled" and case.loss == "jsd":
        raise Unavailable("backend='tiled' does not offer jsd")
    return lambda: losses.linear_divergence(*student, *teacher, divergence=case.loss, beta=case.beta, **labels)


def _rows(inputs: Inputs) -> tuple[Tensor, ...]:
    """The values that `_rowwise` takes of every kept token."""
    hidden, teacher, labels, advantages = inputs.kept()
    return hidden, labels, advantages, *(inputs.kept_top_k() if inputs.case.top_k else (teacher,))


def _rowwise(
    inputs: Inputs, weight: Tensor, hidden: Tensor, labels: Tensor, advantages: Tensor, *teacher: Tensor
) -> Tensor:
    """The summed loss of rows, written as most trainers write it: logits in the dtype of the model, then fp32."""
    case = inputs.case
    log_q = whole = F.linear(hidden, weight).float().log_softmax(-1)
    if case.loss == "cross_entropy":
        return F.nll_loss(log_q, labels, reduction="sum")
    if case.top_k:  # the ids, and what they leave of 1
        ids, log_p = teacher
        log_q, log_p = _outcomes(log_q.gather(1, ids)), _outcomes(log_p)
    else:
        log_p = F.linear(*teacher, inputs.teacher_weight).float().log_softmax(-1)
    if case.loss == "forward_kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if case.loss == "jsd":
        mixture = torch.stack((log_p + math.log(case.beta), log_q + math.log1p(-case.beta))).logsumexp(0)
        over_p = F.kl_div(mixture, log_p, reduction="sum", log_target=True)
        return case.beta * over_p + (1 - case.beta) * F.kl_div(mixture, log_q, reduction="sum", log_target=True)
    reverse_kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if case.loss == "reverse_kl":
        return reverse_kl
    return reverse_kl - (advantages * whole.gather(1, labels[:, None])[:, 0]).sum()


def _outcomes(logprobs: Tensor) -> Tensor:  # (N, k) -> (N, k + 1)
    tail = -torch.expm1(logprobs.logsumexp(1, keepdim=True))
    return torch.cat((logprobs, tail.clamp(min=torch.finfo(tail.dtype).eps).log()), 1)


def _eager(inputs: Inputs) -> Call:
    def run() -> Tensor:
        return _rowwise(inputs, inputs.student_weight, *_rows(inputs)) / inputs.case.kept

    return run


def _full_logits(inputs: Inputs) -> Call:
    """Logits of all models and the gradient of the student's, in the dtype of the model, without any loss on them."""
    hidden, teacher, *_ = inputs.kept()

    def run() -> Tensor:
        logits = F.linear(hidden, inputs.student_weight)
        with torch.no_grad():  # held until the gradient of the student's has been made, as a loss would
            run.held = F.linear(teacher, inputs.teacher_weight) if inputs.case.needs_teacher else None
        return logits.mean()

    return run


def _compiled(inputs: Inputs) -> Call:
    rowwise = torch.compile(functools.partial(_rowwise, inputs), dynamic=False)

    def run() -> Tensor:
        return rowwise(inputs.student_weight, *_rows(inputs)) / inputs.case.kept

    return run


def _checkpointed(inputs: Inputs) -> Call:
    def run() -> Tensor:
        chunks = zip(*(tensor.split(CHECKPOINT_ROWS) for tensor in _rows(inputs)), strict=True)
        total = sum(
            checkpoint(_rowwise, inputs, inputs.student_weight, *chunk, use_reentrant=False) for chunk in chunks
        )
        return total / inputs.case.kept

    return run


def _matmuls(inputs: Inputs) -> Call:
    """The bare matrix products: no loss, the yardstick of `ratio_to_matmuls`. Its gradient is a product like any."""
    case = inputs.case
    device = inputs.student_hidden.device
    half = device.type == "cuda" and case.dtype != "float32"
    chunk = chunk_rows(
        case.kept, case.vocab, models=2 if case.needs_teacher else 1, itemsize=4, device=device, chunk_bytes=None
    )
    with torch.no_grad():  # once: dropping rows is no product, and a CPU has none of half precision with an fp32 result
        kept, teacher, _, _ = inputs.kept()
        leaf = kept.detach().requires_grad_()
        operands = (kept, inputs.student_weight, teacher, inputs.teacher_weight)
        rows, weight, teacher, teacher_weight = (one.detach() if half else one.detach().float() for one in operands)

    # rows as long as the fast products want them, as ours are
    out_s, out_t = (logits_buffer(chunk, case.vocab, torch.float32, device) for _ in range(2))
    dz = logits_buffer(chunk, case.vocab, rows.dtype, device).normal_() if half else out_s
    wide = dict(out_dtype=torch.float32) if half else {}

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx, graded, *leaves):
            if graded:
                grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight, dtype=torch.float32)
                ctx.save_for_backward(grad_rows, grad_weight)
            for start in range(0, rows.shape[0], chunk):
                part = rows[start : start + chunk]
                size = part.shape[0]
                torch.mm(part, weight.t(), out=out_s[:size], **wide)
                if case.needs_teacher:
                    torch.mm(teacher[start : start + chunk], teacher_weight.t(), out=out_t[:size], **wide)
                if graded:
                    torch.mm(dz[:size], weight, out=grad_rows[start : start + chunk])
                    if start:
                        torch.addmm(grad_weight, dz[:size].t(), part, out=grad_weight, **wide)
                    else:
                        torch.mm(dz[:size].t(), part, out=grad_weight, **wide)
            return torch.ones((), device=device)

        @staticmethod
        def backward(ctx, grad_output):
            grad_rows, grad_weight = ctx.saved_tensors
            return None, grad_rows.to(leaf.dtype), grad_weight.to(leaf.dtype)

    def run() -> Tensor:
        leaf.grad = None
        # inside of the function nothing says whether gradients are wanted
        return Products.apply(torch.is_grad_enabled(), leaf, inputs.student_weight)

    return run


PROVIDERS: dict[str, Callable[[Inputs], Call]] = {
    "minillm_torch": functools.partial(_ours, "torch"),
    "minillm_triton": functools.partial(_ours, "triton"),
    "minillm_triton_lean": functools.partial(_ours, "triton", **LEAN),
    "minillm_tiled": functools.partial(_ours, "tiled"),
    FULL_LOGITS: _full_logits,
    "eager": _eager,
    "torch_compile": _compiled,
    "checkpointed": _checkpointed,
    **PEERS,
    YARDSTICK: _matmuls,
}
