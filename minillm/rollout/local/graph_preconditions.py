"""The conditions of sampling with CUDA graphs: the device, and models whose pass over one token is the same at every length."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from minillm import UserError
from minillm.models.quantization import is_quantized
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache
from minillm.teachers.pair import Models


def require_cuda_graphs(models: Models) -> None:
    """Raises UserError where a decode step of these models cannot be captured, and says why."""
    require_gpu(models.device)
    if models.delta is not None:
        raise UserError("rollout.cuda_graphs: a delta's logits are added in the ordinary loop alone; leave it out")
    require_static_shapes("student", models.student)
    if models.teacher is not None and models.teacher.model is not None:
        require_static_shapes("teacher", models.teacher.model)


def require_gpu(device: torch.device) -> None:
    """Raises UserError for a device without CUDA graphs."""
    if device.type != "cuda":
        raise UserError(
            f"rollout.cuda_graphs is true, but the models are on the {device.type}, and CUDA graphs need a GPU. Leave it "
            "out there: the ordinary loop is the faster one"
        )


def require_static_shapes(role: str, model: PreTrainedModel) -> None:
    """Raises UserError where a model's pass over one token depends on more than the memory that it reads."""
    config = model.config.get_text_config()
    layers = make_cache(model, lambda: RoomyLayer(0)).layers
    special = sorted({type(layer).__name__ for layer in layers} - {RoomyLayer.__name__})
    rotary = rotary_by_length(config)
    attention = config._attn_implementation
    if special:
        why = f"keeps {', '.join(special)} in its cache: a sliding window or a recurrent state"
    elif rotary:
        why = f"chooses its rotary frequencies by the longest sequence (rope_type {', '.join(rotary)})"
    elif getattr(config, "alibi", False) or config.model_type == "bloom":
        why = "computes its ALiBi from a mask that grows with the answers"
    elif attention not in ("sdpa", "eager"):
        why = f"has attn_implementation {attention}, which takes no mask over a cache's columns; sdpa and eager do"
    elif is_quantized(model):
        why = "is quantised, and its kernels ask the host on the way"
    else:
        return
    raise UserError(
        f"rollout.cuda_graphs: the {role} ({type(model).__name__}) {why}. Leave rollout.cuda_graphs out for this model"
    )


def rotary_by_length(config: PreTrainedConfig) -> set[str]:
    """The rope_types of an architecture that choose their frequencies by the longest sequence."""
    parameters = getattr(config, "rope_parameters", None) or {}  # one, or one for each type of layer
    nested = [one for one in parameters.values() if isinstance(one, dict)]
    return {one.get("rope_type") for one in nested or [parameters]} & {"dynamic", "longrope"}
