"""Hidden states and head of any causal language model of transformers, without its [tokens, vocabulary] logits."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm import UserError
from minillm.kernels.reference import logits as head_logits
from minillm.losses import LMHead
from minillm.models.batch import TokenBatch


def decoder(model: PreTrainedModel):
    """The model below the language-model head."""
    return getattr(model, model.base_model_prefix)


def last_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, L) int64
    attention_mask: Tensor,  # (B, L)
    position_ids: Tensor | None = None,  # (B, L)
    **extras: Tensor,
) -> Tensor:  # (B, L, H)
    """What the head is applied to, at every position."""
    output = forward_decoder(model, input_ids, attention_mask, position_ids, use_cache=False, **extras)
    return output.last_hidden_state


def row_hidden(model: PreTrainedModel, batch: TokenBatch) -> Tensor:  # (N, H)
    """The last hidden states at the rows of a batch that is on the model's device."""
    hidden = last_hidden(model, batch.input_ids, batch.attention_mask, batch.position_ids, **batch.extras)
    return rows_of(hidden, batch)


def rows_of(hidden: Tensor, batch: TokenBatch) -> Tensor:  # (B, L, H) -> (N, H)
    """Hidden states at the rows of a batch."""
    return hidden.flatten(0, 1).index_select(0, batch.rows)


def forward_decoder(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, position_ids, **options):
    """One forward pass below the head; without positions the model numbers them by itself."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return decoder(model)(input_ids=input_ids, attention_mask=attention_mask, **positions, **options)


def checkpoint_activations(model: PreTrainedModel, **options) -> None:
    """Compute activations again in the backward pass. `options` are those of torch.utils.checkpoint."""
    # transformers before 5.23 know the older name alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})


def lm_head(model: PreTrainedModel) -> LMHead:
    """The head with what the architecture does to its logits: Gemma's softcap, Cohere's scale, Granite's divisor.

    Raises UserError for a head that is not a plain linear layer (a LoRA-wrapped one would be ignored silently).
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    if hasattr(head, "base_layer"):
        raise UserError("the LM head is wrapped by an adapter, which a fused loss cannot see; leave lm_head out of it")
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1.0
    divisor = getattr(config, "logits_scaling", None)
    if divisor:
        scale = scale / divisor
    return LMHead(
        head.weight,
        bias=getattr(head, "bias", None),
        logit_scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def head_error(model: PreTrainedModel) -> float:
    """How far `lm_head` on `last_hidden` is from the logits of the model itself: the largest difference, as a share of
    the largest logit, over a few ids. Not 0 to rounding where the architecture does something to its logits that
    `lm_head` does not know."""
    ids = torch.arange(8, device=model.device)[None] % lm_head(model).weight.shape[0]
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    head = lm_head(model)
    ours = head_logits(
        last_hidden(model, ids, mask), head.weight, head.bias, logit_scale=head.logit_scale, softcap=head.softcap
    ).float()
    difference = torch.where(ours == expected, 0.0, (ours - expected).abs()).max()  # banned ids are -inf in both
    largest = expected.masked_fill(expected == -torch.inf, 0.0).abs().max()
    return (difference / largest).item() if difference != 0 else 0.0
