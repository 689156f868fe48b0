"""A mixture of experts from a dense model: its feed-forward layers copied into the experts of a stock architecture.

Sparse upcycling (Komatsuzaki et al., 2212.05055), with the routed experts' weights renormalised to 1: while all experts
of a layer are one function, the mixture computes what the dense model does, whatever its routers say.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from minillm import UserError
from minillm.config.sparse_architecture import KEY, form_of, upcycled_architecture
from minillm.config.upcycle import SparseForm, UpcycleConfig
from minillm.models.families import auto_class, text_config
from minillm.models.pruning import last_hidden_of_both, layers_of
from minillm.models.routers import experts_of

_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}  # routers compute in fp32
_ROUNDING_OF_HALVES = 0.05


def upcycle(model: PreTrainedModel, keys: UpcycleConfig, *, seed: int, hollow: bool = False) -> PreTrainedModel:
    """The mixture of experts that begins as a dense model; it takes over the tensors of the one given.

    Args:
        seed: keys the routers' weights, and the noise on the copies.
        hollow: the weights hold nothing yet, and hold nothing in the result.
    Raises UserError as upcycled_architecture does, and for a model whose sparse form would compute something else.
    """
    form = form_of(text_config(model.config))
    architecture = upcycled_architecture(model.config, keys)
    options = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    if model.dtype == torch.float64:  # which grouped products do not have
        options["experts_implementation"] = "eager"
    with no_init_weights():  # memory that is never written takes no room
        sparse = auto_class(architecture).from_config(architecture, **options)
    sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.train(model.training)
    _fill(sparse, model, form, keys, torch.Generator().manual_seed(seed))
    if hollow:
        return sparse
    _require_same_outputs(model, sparse)
    if keys.noise:
        _add_noise(sparse, keys.noise, torch.Generator().manual_seed(seed + 1))
    return sparse


@torch.no_grad()
def _fill(
    sparse: PreTrainedModel, dense: PreTrainedModel, form: SparseForm, keys: UpcycleConfig, drawn: torch.Generator
) -> None:
    """Give the sparse model the dense one's weights, copies of its feed-forward layers, and new routers."""
    given, state = dense.state_dict(), {}
    wanted = sparse.state_dict()
    blocks = dict(_blocks(sparse, dense, form))
    for name, tensor in wanted.items():
        block = next((one for one in blocks if name.startswith(f"{one}.")), None)
        if block is None:
            state[name] = given.pop(name, None)
            continue
        part = name.removeprefix(f"{block}.")
        if part in ("experts.gate_up_proj", "experts.down_proj"):
            projections = ("gate_proj", "up_proj") if "gate" in part else ("down_proj",)
            whole = torch.cat([given.pop(f"{blocks[block]}.{one}.weight") for one in projections])
            state[name] = whole.expand(keys.num_experts, *whole.shape).clone()  # (E, 2 I, H) or (E, H, I)
        elif part.startswith(form.zeros):
            state[name] = torch.zeros_like(tensor)
        else:
            state[name] = (keys.router_std * torch.randn(tensor.shape, generator=drawn)).to(tensor)  # (E, H)
    wrong = [name for name, tensor in state.items() if tensor is None or tensor.shape != wanted[name].shape]
    left = [*wrong, *given]
    if left:
        raise UserError(f"{KEY}: {left[0]} of a {form.model_type} is not that of this model; choose another one")
    sparse.load_state_dict(state, assign=True)
    sparse.tie_weights()


def _blocks(sparse: PreTrainedModel, dense: PreTrainedModel, form: SparseForm):
    """(name of a block of experts, name of the feed-forward layer that it is made of), from the first layer on."""
    names = {id(module): name for name, module in sparse.named_modules()}
    for layer, before in zip(layers_of(sparse)[2], layers_of(dense)[2], strict=True):
        block = getattr(layer, form.block)
        if hasattr(block, "experts"):
            yield names[id(block)], next(name for name, one in dense.named_modules() if one is before.mlp)


@torch.no_grad()
def _add_noise(sparse: PreTrainedModel, size: float, drawn: torch.Generator) -> None:
    for module in experts_of(sparse):
        for weight in module.parameters():  # (E, O, I)
            for one in weight:
                noise = torch.randn(one.shape, generator=drawn)
                one.add_((size * one.float().std() * noise).to(one))


def _require_same_outputs(dense: PreTrainedModel, sparse: PreTrainedModel) -> None:
    message = f"{KEY}: {type(sparse).__name__} computes something else than this {type(dense).__name__}"
    expected, found = last_hidden_of_both(dense, sparse, message)
    difference: Tensor = (found - expected).norm() / expected.norm()
    if not difference <= _ROUNDING.get(dense.dtype, _ROUNDING_OF_HALVES):
        raise UserError(f"{message} (they differ by {difference:.1e} of what it computes); choose another model")
