"""Passes through a few layers of a model whose layers are alike, with the moments that count of a pass through all."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from minillm.models.families import text_config
from minillm.planning.ledger import Ledger
from minillm.planning.sizes import decoder_layers, weight_count

FEW = 3  # the first, the last, and one between them


def left_out_of(model: PreTrainedModel, layers: nn.ModuleList) -> int:
    """Count the layers that a pass through FEW of them leaves out; 0 where they are not alike, or few."""
    alike = len(set(getattr(text_config(model.config), "layer_types", None) or [None])) == 1
    alike = alike and len({weight_count(layer) for layer in layers}) == 1
    return max(0, len(layers) - FEW) if alike else 0


@contextmanager
def few_trained_layers(model: PreTrainedModel, ledger: Ledger) -> Iterator[None]:
    """Let a model take a forward and a backward pass through FEW of its layers, counted as a pass through all.

    From layer to layer what is alive changes by the same bytes, in either pass, so that the worst moment is in the first
    layer or in the last one. The one in the middle stands for all others: what it leaves alive when the next one begins,
    activations in the forward pass and gradients in the backward pass, is counted as often as there are.
    """
    parent, attribute, layers = decoder_layers(model)
    left_out, entered = left_out_of(model, layers), set()
    if not left_out:
        yield
        return

    def enter(place: int, layer: nn.Module, given: tuple, named: dict) -> None:
        tensors = (one for one in (*given, *named.values()) if isinstance(one, Tensor))
        states = next((one for one in tensors if one.requires_grad), None)
        if place in entered or states is None:  # computed again in the backward pass, or without one
            return
        entered.add(place)
        if place == 1:
            ledger.begin_repeated(states)
        else:
            ledger.repeat(left_out + 1, without=states)
        states.register_hook(lambda _: leave(place))  # the way back is through a layer once this gradient is there

    def leave(place: int) -> None:
        if place == 1:
            ledger.repeat(left_out + 1, name="gradients")
        else:
            ledger.begin_repeated()

    hooks = [layers[place].register_forward_pre_hook(partial(enter, place), with_kwargs=True) for place in (1, FEW - 1)]
    setattr(parent, attribute, layers[:FEW])
    try:
        yield
    finally:
        setattr(parent, attribute, layers)
        for hook in hooks:
            hook.remove()
