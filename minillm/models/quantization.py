"""A teacher's linear layers in 8 or 4 bits through bitsandbytes. Its head and embeddings stay as they are, so that the
fused losses read a plain head."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from minillm import UserError

if TYPE_CHECKING:  # the rollouts' benchmark runs where pydantic is not
    from minillm.config.models import Quantization

CPU_OUTPUTS, CPU_INPUTS = 32, 64  # bitsandbytes packs such multiples alone in 4 bits on a CPU with AVX-512


def quantization_options(kind: "Quantization", dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of from_pretrained, beside a dtype, that quantise each layer on its way to the device.

    int8 is LLM.int8 (arXiv 2208.07339), with columns beyond its threshold in fp16; nf4 the 4-bit NormalFloat of QLoRA
    (arXiv 2305.14314), its scales quantised once more, computing in `dtype`.
    """
    if kind == "int8":
        # it says at every call that it computes in fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def check_quantized(model: PreTrainedModel) -> None:
    """Raises UserError where the head was quantised too, or where a CPU could not run the layers."""
    head = model.get_output_embeddings()
    if not head.weight.is_floating_point():
        raise UserError(
            f"teacher.quantization: the head of {type(model).__name__} would be quantised too, which a fused loss cannot "
            "read; leave teacher.quantization out for this model"
        )
    odd = [
        f"{name} ({module.in_features} to {module.out_features})"
        for name, module in model.named_modules()
        if getattr(module, "support_avx512bf16_for_cpu", False)
        and (module.out_features % CPU_OUTPUTS or module.in_features % CPU_INPUTS)
    ]
    if model.device.type == "cpu" and odd:
        raise UserError(
            f"teacher.quantization: nf4 on this CPU is for layers from a multiple of {CPU_INPUTS} to one of {CPU_OUTPUTS}, "
            f"which {len(odd)} of its layers are not, {odd[0]} the first; use int8, or a GPU"
        )


def is_quantized(model: nn.Module | None) -> bool:
    """True where its weights are no plain tensors any more."""
    return getattr(model, "is_quantized", False)


def quantization_name(model: PreTrainedModel) -> str:
    """The value of teacher.quantization that names it."""
    config = model.config.quantization_config
    return "int8" if config.load_in_8bit else config.bnb_4bit_quant_type


def element_count(parameter: nn.Parameter) -> int:
    """Weights of a parameter, however they are packed."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()
