"""The heads of models and modules: what an architecture of transformers does to its logits, and PEFT's adapters on the head.

Nothing is imported of either library: models and modules are known by their attributes.
"""

import math

import torch
from torch import Tensor, nn

from minillm.kernels.head import LMHead
from minillm.kernels.reference import logits as reference_logits
from minillm.kernels.sharded_heads import whole

# Names under which configurations keep a factor of the logits, a divisor, or a softcap.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES_BY_ITS_DIVISOR = ("hyperclovax",)  # beginnings of model_type
USES_NONE = ("mpt",)  # has a factor in its configuration alone
WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel and DeepSpeed's engine; torch.compile


def head_of_model(model: nn.Module, *, check: bool = False) -> LMHead:
    """The head of a language model of transformers: `LMHead.of` says more."""
    model = unwrapped(model)
    find = getattr(model, "get_output_embeddings", None)
    module = find() if callable(find) else None
    if module is None:
        raise ValueError(
            f"{type(model).__name__} has no LM head; pass a model that answers in text, such as a ...ForCausalLM"
        )
    scale, softcap = _scaling(model)
    weight, bias = linear_parameters(module, f"the head of {type(model).__name__}")
    head = LMHead(weight, bias, logit_scale=scale, softcap=softcap)
    if check:
        _require_equal(model, head)
    return head


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, DeepSpeed's engine, torch.compile's and PEFT's wrappers."""
    while True:
        children = dict(model.named_children())
        inside = next((children[name] for name in WRAPPERS if name in children), None)
        if inside is None and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inside = model.get_base_model()
        if inside is None or inside is model:
            return model
        model = inside


def _scaling(model: nn.Module) -> tuple[float, float | None]:
    """Scale and softcap by the model's configuration."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type in USES_NONE:
        return 1.0, None

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    scale = 1.0
    for name in FACTORS:
        value = number(name)
        scale *= 1.0 if value is None else value
    for name in DIVISORS:
        value = number(name)
        if value:
            multiplies = str(config.model_type).startswith(MULTIPLIES_BY_ITS_DIVISOR)
            scale = scale * value if multiplies else scale / value
    softcap = next((value for name in SOFTCAPS if (value := number(name)) is not None), None)
    return scale, softcap


def model_body(model: nn.Module) -> nn.Module:
    """The module of a transformers model whose `last_hidden_state` the head is applied to.

    Where a model of images and text has a whole language model inside, head and all (Llama 4), it is the one of that.
    Raises ValueError where there is none.
    """
    if model.base_model is not model:
        return model.base_model
    embeddings = model.get_input_embeddings()
    found = [
        child
        for child in model.children()
        if hasattr(child, "get_output_embeddings") and any(module is embeddings for module in child.modules())
    ]
    if len(found) == 1 and found[0].get_output_embeddings() is not None:
        return model_body(found[0])
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} computes its logits without a module below the LM head that could be run by itself; "
            "choose a model of another architecture"
        )
    return found[0]


@torch.no_grad()
def head_error(model: nn.Module, head: LMHead, **inputs: Tensor) -> float:
    """The distance of a head's logits from those of the model: the largest difference as a part of the largest logit.

    Over `inputs`, a few ids where there are none; not 0 to rounding where the architecture does to its
    logits what the head does not know, NaN where a weight is not a number.
    """
    if not inputs:
        ids = torch.arange(8, device=model.device)[None] % head.weight.shape[0]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(**inputs, use_cache=False).logits.float()
    hidden = model_body(model)(**inputs, use_cache=False).last_hidden_state
    weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
    ours = reference_logits(hidden, weight, bias, logit_scale=head.logit_scale, softcap=head.softcap).float()
    if ours.shape != expected.shape:
        return math.inf
    difference = torch.where(ours == expected, 0.0, (ours - expected).abs()).max()  # banned ids are -inf in both
    largest = expected.masked_fill(expected == -torch.inf, 0.0).abs().max()
    return (difference / largest).item() if difference != 0 else 0.0


def tolerance(dtype: torch.dtype) -> float:
    """The most by which rounding sets a head's logits apart from the model's."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.05


def _require_equal(model: nn.Module, head: LMHead) -> None:
    name, training = type(model).__name__, model.training
    model.eval()  # dropout would make two different models of one
    try:
        error = head_error(model, head)
    finally:
        model.train(training)
    if not error <= tolerance(model.dtype):
        raise ValueError(
            f"the logits of {name} differ from its head on its last hidden states by {error:.1%} of the largest: either a "
            "weight is not finite, or the architecture does something to its logits that LMHead.of does not know; build "
            "the LMHead by hand (weight, bias, logit_scale, softcap) from the model's code"
        )


def linear_parameters(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) of a linear layer as PEFT's adapters leave it: a graph leads to what they train.

    Raises ValueError naming what cannot be.
    """
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return linear_parameters(_saved(module, name), name)
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return _with_lora(module, name)
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"{name} is wrapped by an adapter that the losses do not know, {type(module).__name__}; merge it, use LoRA, or "
            "leave the head out of its target modules"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name} is a {type(module).__name__} without a weight; pass a linear layer or an LMHead")
    if not weight.is_floating_point():
        raise ValueError(f"{name} is quantised, its weight is {weight.dtype}; dequantise it, or leave the head out")
    return weight, getattr(module, "bias", None)


def _saved(module: nn.Module, name: str) -> nn.Module:
    """The copy that PEFT's modules_to_save trains, or the original where adapters are off."""
    active = [adapter for adapter in _active(module) if adapter in module.modules_to_save]
    if getattr(module, "disable_adapters", False) or not active:
        return module.original_module
    if len(active) > 1:
        raise ValueError(f"{name} has {len(active)} active copies, {', '.join(active)}; activate one adapter")
    return module.modules_to_save[active[0]]


def _active(module: nn.Module) -> list[str]:
    active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", [])
    return [active] if isinstance(active, str) else list(active)


def _with_lora(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """W + sum of scaling * B A over the active adapters, in the dtype of W, rounded once."""
    weight, bias = linear_parameters(module.get_base_layer(), name)
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return weight, bias
    total = None
    for adapter in _active(module):
        if adapter not in module.lora_A:
            continue
        _require_plain(module, adapter, name)
        down, up, scaling = module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter]
        delta = (whole(up.weight) @ whole(down.weight)) * scaling
        total = delta if total is None else total + delta
        if up.bias is not None:
            shift = whole(up.bias) * scaling
            bias = shift.to(weight.dtype) if bias is None else (whole(bias) + shift).to(bias.dtype)
    if total is not None:
        weight = (whole(weight) + total).to(weight.dtype)
    return weight, bias


def _require_plain(module: nn.Module, adapter: str, name: str) -> None:
    """Refuses what makes the adapted layer another function than that of one weight."""
    if getattr(module, "use_dora", {}).get(adapter) or adapter in getattr(module, "lora_variant", {}):
        raise ValueError(f"{name}: adapter {adapter!r} is not plain LoRA (DoRA and its kind); use LoRA on the head")
    dropout = module.lora_dropout[adapter] if adapter in getattr(module, "lora_dropout", {}) else None
    if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
        raise ValueError(
            f"{name}: adapter {adapter!r} has lora_dropout={dropout.p}, which no merged weight can have; set it to 0 for "
            "the head, or call .eval() on it"
        )
