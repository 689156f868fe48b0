"""A delta: a small model whose logits are added to those of another one (Cross-model Control, arXiv 2410.17599).

    log q(v | x, y_<t) = log softmax(z + alpha z_D[map])_v

z are the logits of the model that is controlled, MODEL. Where both have one tokenizer, map is the identity and the delta
reads MODEL's ids. Where they have two, the delta reads the same text in its own ids, and map is a VocabularyMap; an id that
is unmapped is left as it is (its shift is 0). The published form normalises z first, by a constant that changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm.losses import LMHead
from minillm.models.access import lm_head
from minillm.models.vocabulary_map import VocabularyMap


@dataclass(frozen=True)
class DeltaPrompt:
    """A prompt as a delta with another tokenizer than MODEL's reads it."""

    text: str
    ids: list[int]
    special: bool  # the tokenizer adds its special tokens to such a text


@dataclass(frozen=True)
class Translation:
    """The way from MODEL's ids to the delta's."""

    tokenizer: PreTrainedTokenizerBase  # MODEL's
    map: VocabularyMap
    prompts: dict[tuple[int, ...], DeltaPrompt] = field(
        default_factory=dict
    )  # MODEL's ids -> in the place of their text

    def read(self, ids: Sequence[int], prompt: DeltaPrompt) -> None:
        """Remember in which words the delta reads a prompt of MODEL; without, it reads the text of the ids."""
        self.prompts[tuple(ids)] = prompt


@dataclass(frozen=True)
class Delta:
    """See the module."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # ids of MODEL
    alpha: float = 1.0  # above 0
    translation: Translation | None = None  # None: both read the same ids

    def head(self) -> LMHead:
        """The head whose logits are alpha z_D[map], a row for each of MODEL's ids."""
        return _scaled(lm_head(self.model), self.alpha) if self.translation is None else self._translated

    @cached_property
    def _translated(self) -> LMHead:
        head, ids = _scaled(lm_head(self.model), self.alpha), self.translation.map.ids
        target = torch.full((self.vocab_size,), -1)
        count = min(len(ids), self.vocab_size)
        target[:count] = ids[:count]
        target = target.to(head.weight.device)
        target = torch.where(target < len(head.weight), target, -1)  # a token that the head has no row for
        mapped, rows = target >= 0, target.clamp_min(0)
        weight = head.weight.detach()[rows].masked_fill_(~mapped[:, None], 0.0)
        bias = None if head.bias is None else head.bias.detach()[rows].masked_fill_(~mapped, 0.0)
        return replace(head, weight=weight, bias=bias)


def _scaled(head: LMHead, alpha: float) -> LMHead:
    """alpha times the logits: alpha c tanh(s x / c) is a softcap of alpha c on a scale of alpha s."""
    softcap = None if head.softcap is None else alpha * head.softcap
    return replace(head, logit_scale=alpha * head.logit_scale, softcap=softcap)
