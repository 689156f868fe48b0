"""The peers' losses, through their public functions, at the inputs of a case.

A peer whose package imports its trainers first, and with them what a benchmark has no use for, is imported without.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor

from minillm.benchmarks.cases import IGNORED, Inputs

Call = Callable[[], Tensor]


class Unavailable(Exception):
    """The reason for which a provider does not run a case."""


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
    if inputs.case.top_k:
        raise Unavailable("takes no top-k teacher")
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
    _without_trainers("trl", "trl.kernels", "trl.trainer")
    # a null context outside of ZeRO-3, in a module that needs the trainers' packages
    _stand_in("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *parameters: contextlib.nullcontext())
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
    _without_trainers("verl", "verl.utils", "verl.utils.kernel")
    _stand_in(
        "verl.utils.device",
        is_cuda_available=torch.cuda.is_available(),
        get_device_capability=torch.cuda.get_device_capability,
        get_device_name=lambda: "cuda",
        get_torch_device=lambda: torch.cuda,
    )
    function = _peer("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")

    def run() -> Tensor:
        hidden, _, labels, _ = inputs.kept()
        return -function(hidden, inputs.student_weight, labels, 1.0, "none")[0].mean()

    return run


def _without_trainers(package: str, *inner: str) -> None:
    """Lets modules of these packages import while the packages themselves load nothing."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise Unavailable(f"{package} is not installed")
    root = spec.submodule_search_locations[0]
    for name in (package, *inner):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = ["/".join((root, *name.split(".")[1:]))]
        sys.modules[name] = module


def _stand_in(name: str, **contents: object) -> None:
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        sys.modules[name] = module


PEERS: dict[str, Callable[[Inputs], Call]] = {
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
}
PEER_PACKAGES = ("liger_kernel", "trl", "fla_core", "cut_cross_entropy", "verl")
