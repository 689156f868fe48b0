"""Hidden states and head of any language model of transformers, without its [tokens, vocabulary] logits."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm import UserError
from minillm.kernels import model_heads
from minillm.losses import LMHead
from minillm.models.batch import TokenBatch
from minillm.models.families import (
    banned_id,
    decoder,
    own_positions,
    packed_positions,
    require_sight,
    sees_pictures,
    token_kinds,
)
from minillm.models.packing import pack, reads_packed, sequence_bounds

# What the code of an architecture raises where its configuration does not go together or its inputs are not what it takes.
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def failed_run(model: PreTrainedModel, error: Exception) -> str:
    """`in bfloat16 on the cpu (RuntimeError: ...)` and what to do, for a model whose own code has raised an error."""
    dtype = str(model.dtype).removeprefix("torch.")
    said = f"in {dtype} on the {model.device.type} ({type(error).__name__}: {' '.join(str(error).split())})"
    if model.dtype.itemsize < 4:
        return (
            f"{said}; where its code does not take {dtype} there, float32 does (`dtype` beside its path, or --dtype); else "
            "its configuration does not go together, or its code needs another environment"
        )
    return f"{said}; its configuration does not go together, or its code needs another environment"


def last_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, L) int64
    attention_mask: Tensor,  # (B, L)
    position_ids: Tensor | None = None,  # (B, L)
) -> Tensor:  # (B, L, H)
    """The hidden states that the head is applied to, at every position of a text."""
    return forward_decoder(model, input_ids, attention_mask, position_ids, use_cache=False).last_hidden_state


def row_hidden(model: PreTrainedModel, batch: TokenBatch) -> Tensor:  # (N, H)
    """The last hidden states at the rows of a batch that is on the model's device."""
    return rows_of(forward_batch(model, batch).last_hidden_state, batch)


def rows_of(hidden: Tensor, batch: TokenBatch) -> Tensor:  # (B, L, H) -> (N, H)
    """Hidden states at the rows of a batch."""
    return hidden.flatten(0, 1).index_select(0, batch.rows)


def forward_layers(model: PreTrainedModel, batch: TokenBatch, layers: Collection[int]) -> tuple[Any, dict[int, Tensor]]:
    """`forward_batch`, and the hidden states of some layers from the same pass: {layer: (B, L, H)}.

    Layer 0 is what the first layer reads, layer n what the n-th gives, and the last one, also named -1, is what the head
    reads. Where no other one is asked for the pass keeps none.
    """
    output = forward_batch(model, batch, **({} if {*layers} <= {-1} else {"output_hidden_states": True}))
    if {*layers} <= {-1}:
        return output, dict.fromkeys(layers, output.last_hidden_state)
    states = output.hidden_states
    last = len(states) - 1
    return output, {layer: output.last_hidden_state if layer in (-1, last) else states[layer] for layer in layers}


def forward_batch(model: PreTrainedModel, batch: TokenBatch, **options):
    """One forward pass below the head over prompts with their answers and what the prompts show, without a cache.

    A model that minillm.models.packing has packed computes nothing for padding; hidden states are (B, L, H) all the same,
    and 0 there.
    """
    if reads_packed(model, batch):
        return forward_packed(model, batch, **options)
    output, _ = forward_shown(
        model,
        batch.input_ids,
        batch.attention_mask,
        batch.position_ids,
        batch.extras,
        prompt=batch.prompt_mask() if sees_pictures(model) else None,
        use_cache=False,
        **options,
    )
    return output


def forward_packed(model: PreTrainedModel, batch: TokenBatch, **options):
    """`forward_batch` of the sequences put end to end in one row, be the model packed or not. It takes no pictures."""
    packed = pack(batch)
    output, _ = forward_shown(
        model,
        packed.input_ids,
        None,  # a mask of the row's tokens would hide from transformers that there are several sequences
        packed_positions(model, packed.position_ids),
        NOTHING,
        prompt=packed.pack(batch.prompt_mask()) if sees_pictures(model) else None,
        use_cache=False,
        **sequence_bounds(model, packed),
        **options,
    )
    output.last_hidden_state = packed.unpack(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(map(packed.unpack, output.hidden_states))
    return output


def forward_shown(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, L) int64
    attention_mask: Tensor | None,  # (B, L); None: all are tokens, of a text wherever positions begin anew
    position_ids: Tensor,  # (B, L), or as an architecture takes them
    extras: Mapping[str, Tensor],  # of the whole batch, as TokenBatch has them
    *,
    prompt: Tensor | None = None,  # (B, L) bool, which tokens are the prompt's; None where that is not known
    **options,
) -> tuple:
    """One forward pass below the head over texts that may show pictures.

    Returns the output, and what to add to the number of a token that follows, (B, 1) int64: None where that is nothing.
    Raises UserError where the model does not take what the prompts show.
    """
    require_sight(model, extras)
    shown = {name: one.to(model.dtype) if one.is_floating_point() else one for name, one in extras.items()}
    inputs = shown | token_kinds(model, input_ids, prompt)
    numbered = own_positions(model, input_ids, attention_mask, inputs)
    positions, shift = (position_ids, None) if numbered is None else numbered
    try:
        return forward_decoder(model, input_ids, attention_mask, positions, **inputs, **options), shift
    except ValueError as error:
        if not extras:
            raise
        raise UserError(f"{type(model).__name__} cannot read the pictures of a batch: {error}") from error


def forward_decoder(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, position_ids, **options):
    """One forward pass below the head; without positions the model numbers them by itself."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return decoder(model)(input_ids=input_ids, attention_mask=attention_mask, **positions, **options)


def checkpoint_activations(model: PreTrainedModel, **options) -> None:
    """Compute activations again in the backward pass. `options` are those of torch.utils.checkpoint."""
    # transformers before 5.23 know the older name alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})


def lm_head(model: PreTrainedModel) -> LMHead:
    """The head with what the architecture does to its logits: Gemma's softcap, Cohere's scale, Granite's divisor; and
    without the token that stands for a picture, where minillm.models.families.answer_beside_pictures says so.

    Raises UserError for a head that is not a plain linear layer (a LoRA-wrapped one would be ignored silently).
    """
    return without_id(plain_head(model), banned_id(model))


def without_id(head: LMHead, banned: int | None) -> LMHead:
    """A head that gives one id no probability; as it is for None, and for an id that it has no row for."""
    if banned is None or banned >= len(head.weight):
        return head
    bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    ban = torch.zeros(len(bias), dtype=torch.bool, device=bias.device)
    ban[banned] = True
    return replace(head, bias=bias.masked_fill(ban, -torch.inf))


def plain_head(model: PreTrainedModel) -> LMHead:
    """`lm_head` with the token that stands for a picture."""
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no LM head; choose a model that answers in text")
    if hasattr(head, "base_layer"):
        raise UserError("the LM head is wrapped by an adapter, which a fused loss cannot see; leave lm_head out of it")
    return LMHead.of(model)


def head_error(model: PreTrainedModel) -> float:
    """The distance of the head of `lm_head` on the last hidden states from the logits of the model: the largest difference,
    as a share of the largest logit, over a few ids. Not 0 to rounding where the architecture does something to its logits
    that `lm_head` does not know."""
    return model_heads.head_error(model, plain_head(model))


@torch.no_grad()
def padding_error(model: PreTrainedModel) -> float:
    """The distance of the last hidden states of a text beside a longer one from those of it alone: the norm of the
    difference as a part of theirs. Not 0 to rounding where an architecture reads the padding at the right as text."""
    ids = torch.arange(8, device=model.device)[None] % plain_head(model).weight.shape[0]

    def read(input_ids: Tensor, mask: Tensor) -> Tensor:  # (B, L) each -> (B, L, H)
        positions = torch.arange(input_ids.shape[1], device=model.device).expand(input_ids.shape)
        prompt = mask.bool() if sees_pictures(model) else None
        output, _ = forward_shown(model, input_ids, mask, positions, NOTHING, prompt=prompt, use_cache=False)
        return output.last_hidden_state

    alone = read(ids[:, :5], torch.ones_like(ids[:, :5])).float()
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[0, 5:] = 0
    beside = read(ids.repeat(2, 1).masked_fill(mask == 0, 0), mask)[:1, :5].float()
    return ((beside - alone).norm() / alone.norm().clamp_min(1e-30)).item()
