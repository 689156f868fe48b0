"""Who computes a loss: this library's backends, plain torch, and the peers, through their public functions.

A provider is a function that takes the inputs of a case and returns a call: the mean loss over kept tokens, a scalar
with a graph. It raises Unavailable with the reason where it is not installed, or computes another loss, or cannot run
on the device. Providers that do not drop ignored rows themselves get the kept rows, as their own trainers do it.
"""

import functools
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minillm import losses
from minillm.benchmarks.cases import IGNORED, Inputs
from minillm.kernels.chunks import chunk_rows, logits_buffer

Call = Callable[[], Tensor]
CHECKPOINT_ROWS = 256
YARDSTICK = "matmuls"


class Unavailable(Exception):
    """Why a provider does not run a case."""


def _ours(backend: str, inputs: Inputs) -> Call:
    case = inputs.case
    student = inputs.student_hidden, inputs.student_weight
    teacher = inputs.teacher_hidden, inputs.teacher_weight
    if backend != "torch" and student[0].device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    # kept: how many labels count, which a trainer knows from its batch
    labels = dict(labels=inputs.labels, ignore_index=IGNORED, kept=case.kept, backend=backend)
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
    if backend == "tiled" and case.loss == "jsd":
        raise Unavailable("backend='tiled' does not offer jsd")
    return lambda: losses.linear_divergence(*student, *teacher, divergence=case.loss, beta=case.beta, **labels)


def _rowwise(inputs: Inputs, weight: Tensor, hidden: Tensor, teacher: Tensor, labels: Tensor, advantages: Tensor):
    """The summed loss of rows, written as most trainers write it: logits in the dtype of the model, then fp32."""
    case = inputs.case
    log_q = F.linear(hidden, weight).float().log_softmax(-1)
    if case.loss == "cross_entropy":
        return F.nll_loss(log_q, labels, reduction="sum")
    log_p = F.linear(teacher, inputs.teacher_weight).float().log_softmax(-1)
    if case.loss == "forward_kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if case.loss == "jsd":
        mixture = torch.stack((log_p + math.log(case.beta), log_q + math.log1p(-case.beta))).logsumexp(0)
        over_p = F.kl_div(mixture, log_p, reduction="sum", log_target=True)
        return case.beta * over_p + (1 - case.beta) * F.kl_div(mixture, log_q, reduction="sum", log_target=True)
    reverse_kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if case.loss == "reverse_kl":
        return reverse_kl
    return reverse_kl - (advantages * log_q.gather(1, labels[:, None])[:, 0]).sum()


def _eager(inputs: Inputs) -> Call:
    def run() -> Tensor:
        hidden, teacher, labels, advantages = inputs.kept()
        return _rowwise(inputs, inputs.student_weight, hidden, teacher, labels, advantages) / inputs.case.kept

    return run


def _compiled(inputs: Inputs) -> Call:
    rowwise = torch.compile(functools.partial(_rowwise, inputs), dynamic=False)

    def run() -> Tensor:
        hidden, teacher, labels, advantages = inputs.kept()
        return rowwise(inputs.student_weight, hidden, teacher, labels, advantages) / inputs.case.kept

    return run


def _checkpointed(inputs: Inputs) -> Call:
    def run() -> Tensor:
        chunks = zip(*(tensor.split(CHECKPOINT_ROWS) for tensor in inputs.kept()), strict=True)
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


# --- peers ----------------------------------------------------------------------------------------------------------

LIGER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}  # and TRL's: the end points of their generalised JSD


def _peer(module: str, name: str) -> Callable:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a peer may fail to import in any way it likes
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed") from error
        raise Unavailable(f"{module} does not import: {type(error).__name__}: {error}") from error


def _only(inputs: Inputs, *offered: str, cuda: bool = False) -> None:
    if inputs.case.loss not in offered:
        raise Unavailable(f"does not compute {inputs.case.loss}")
    if cuda and inputs.student_hidden.device.type != "cuda":
        raise Unavailable("needs a CUDA device")


def _beta(inputs: Inputs) -> float:
    return LIGER_BETA.get(inputs.case.loss, inputs.case.beta)


def _liger_fused(accumulation: torch.dtype | None, inputs: Inputs) -> Call:
    _only(inputs, "reverse_kl", "forward_kl", "jsd", cuda=True)
    module = _peer("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD")
    loss = module(jsd_beta=_beta(inputs), ignore_index=IGNORED, accum_dtype=accumulation)
    return lambda: loss(
        inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
    )


def _liger_chunked(compiled: bool, inputs: Inputs) -> Call:
    _only(inputs, "reverse_kl", "forward_kl", "jsd")
    module = _peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    loss = module(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_beta(inputs), ignore_index=IGNORED, compiled=compiled
    )
    return lambda: loss(
        inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
    )


def _trl(inputs: Inputs) -> Call:
    _only(inputs, "reverse_kl", "forward_kl", "jsd")
    function = _peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")

    def run() -> Tensor:
        hidden, teacher, _, _ = inputs.kept()
        student = hidden, inputs.student_weight, None
        return function.apply(*student, teacher, inputs.teacher_weight, None, _beta(inputs))[0].mean()

    return run


def _fla(accumulate_fp32: bool, inputs: Inputs) -> Call:
    _only(inputs, "forward_kl", cuda=True)
    function = _peer("fla.modules.fused_kl_div", "fused_kl_div_loss")

    def run() -> Tensor:
        hidden, teacher, _, _ = inputs.kept()
        return function(
            hidden,
            teacher,
            inputs.student_weight,
            inputs.teacher_weight,
            accumulate_grad_in_fp32=accumulate_fp32,
        )

    return run


def _liger_cross_entropy(inputs: Inputs) -> Call:
    _only(inputs, "cross_entropy", cuda=True)
    module = _peer("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    loss = module(ignore_index=IGNORED, accum_dtype=torch.float32)
    return lambda: loss(inputs.student_weight, inputs.student_hidden, inputs.labels)


def _cce(inputs: Inputs) -> Call:
    _only(inputs, "cross_entropy", cuda=True)
    function = _peer("cut_cross_entropy", "linear_cross_entropy")
    return lambda: function(inputs.student_hidden, inputs.student_weight, inputs.labels, ignore_index=IGNORED)


def _verl(inputs: Inputs) -> Call:
    _only(inputs, "cross_entropy", cuda=True)
    _verl_without_its_trainers()
    function = _peer("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")

    def run() -> Tensor:
        hidden, _, labels, _ = inputs.kept()
        return -function(hidden, inputs.student_weight, labels, 1.0, "none")[0].mean()

    return run


def _verl_without_its_trainers() -> None:
    """Lets verl's kernels import without Ray and the rest of its trainers, which its packages load on import."""
    if "verl" in sys.modules:
        return
    spec = importlib.util.find_spec("verl")
    if spec is None:
        raise Unavailable("verl is not installed")
    root = spec.submodule_search_locations[0]
    for name in ("verl", "verl.utils", "verl.utils.kernel"):
        package = types.ModuleType(name)
        package.__path__ = ["/".join((root, *name.split(".")[1:]))]
        sys.modules[name] = package
    device = types.ModuleType("verl.utils.device")
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_capability = torch.cuda.get_device_capability
    device.get_device_name = lambda: "cuda"
    device.get_torch_device = lambda: torch.cuda
    sys.modules["verl.utils.device"] = device


PROVIDERS: dict[str, Callable[[Inputs], Call]] = {
    "minillm_torch": functools.partial(_ours, "torch"),
    "minillm_triton": functools.partial(_ours, "triton"),
    "minillm_tiled": functools.partial(_ours, "tiled"),
    "eager": _eager,
    "torch_compile": _compiled,
    "checkpointed": _checkpointed,
    "liger_fused": functools.partial(_liger_fused, None),
    "liger_fused_fp32_accum": functools.partial(_liger_fused, torch.float32),
    "liger_chunked": functools.partial(_liger_chunked, False),
    "liger_chunked_compiled": functools.partial(_liger_chunked, True),
    "trl": _trl,
    "fla": functools.partial(_fla, False),
    "fla_fp32_accum": functools.partial(_fla, True),
    "liger_cross_entropy": _liger_cross_entropy,
    "cce": _cce,
    "verl": _verl,
    YARDSTICK: _matmuls,
}
PEER_PACKAGES = ("liger_kernel", "trl", "fla_core", "cut_cross_entropy", "verl")
