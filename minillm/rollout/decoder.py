"""One model with its KV cache alive: prompts in, then a token a row and step, next-token logits out."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from minillm.kernels.head import project
from minillm.models.access import forward_decoder, lm_head


class Decoder:
    """Decodes a left-padded batch. Only the last position is projected, and only on the shared vocabulary."""

    def __init__(self, model: PreTrainedModel, vocab_size: int):
        self.model = model
        self.head = lm_head(model)
        self.weight = self.head.weight[:vocab_size]  # (V, H)
        self.bias = None if self.head.bias is None else self.head.bias[:vocab_size]
        self.cache = DynamicCache(config=model.config)

    def step(
        self,
        input_ids: Tensor,  # (B, L): the prompts at first, then (B, 1)
        attention_mask: Tensor,  # (B, everything so far)
        position_ids: Tensor,  # (B, L)
    ) -> Tensor:  # (B, V) fp32 (float64 for a float64 model)
        """Logits of the next token."""
        output = forward_decoder(
            self.model, input_ids, attention_mask, position_ids, past_key_values=self.cache, use_cache=True
        )
        hidden = output.last_hidden_state[:, -1]
        logits = torch.empty(
            len(hidden),
            len(self.weight),
            dtype=torch.promote_types(hidden.dtype, torch.float32),
            device=hidden.device,
        )
        project(hidden, self.weight, self.bias, hidden.dtype, logits)
        if self.head.logit_scale != 1.0:
            logits *= self.head.logit_scale
        if self.head.softcap is not None:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return logits

    def keep(self, rows: Tensor) -> None:  # (B',) int64
        """Drop all rows of the batch but these."""
        self.cache.batch_select_indices(rows)
