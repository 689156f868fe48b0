"""The model of a server: rows of texts that several clients ask for at once, answers to prompts, and its identity."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm.data.fingerprints import template_fingerprint, tokenizer_fingerprint
from minillm.losses import LMHead
from minillm.models.access import plain_head
from minillm.models.batch import collate
from minillm.models.tokenizers import end_ids
from minillm.rollout.local.decoder import check_positions
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.teachers.cached import head_bytes
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from minillm.teachers.row_storage import likeliest
from minillm.teachers.wire import VERSION, BadMessage, RowsRequest, SampleRequest, pack_answers

SAMPLED = 4096  # elements of a weight that its fingerprint reads


class ServedModel:
    """A model that answers requests, one call at a time.

    Args:
        name: what clients know it by.

    Raises UserError for a model whose answers are not those that it would score: minillm.rollout.local.decoding_check.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer, self.teacher = model, tokenizer, LocalTeacher(model)
        self.ids = model.get_input_embeddings().weight.shape[0]
        eos_ids = end_ids(model, tokenizer)
        models = Models(model, None, tokenizer, self.teacher.vocab_size, eos_ids, 0, model.device)
        self.rollouts = LocalRollouts(models)
        self.rollouts.check("student")
        self.described: dict[str, Any] = {
            "version": VERSION,
            "model": name,
            "architecture": type(model).__name__,
            "fingerprint": weights_fingerprint(model),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "template": template_fingerprint(tokenizer),
            "vocab_size": self.teacher.vocab_size,
            "hidden_size": plain_head(model).weight.shape[1],
            "dtype": str(plain_head(model).weight.dtype).removeprefix("torch."),
            "end_ids": list(eos_ids),
        }

    @property
    def fingerprint(self) -> str:
        """See `weights_fingerprint`."""
        return self.described["fingerprint"]

    def head(self) -> bytes:
        """The head as minillm.teachers.cached.read_head reads it."""
        return head_bytes(plain_head(self.model))

    def require_readable(self, request: RowsRequest) -> None:
        """Raises UserError for texts that the model cannot read, and likeliest ids that it has not."""
        if any(not one.prompt for one in request.sequences):
            raise BadMessage("a prompt has no tokens, so nothing predicts its first response token")
        self._require_ids([ids for one in request.sequences for ids in (one.prompt, one.response)])
        check_positions(self.model, request.longest)
        least = min(self.teacher.vocab_size, request.vocab_size or self.teacher.vocab_size)
        if request.rows == "top_k" and request.k > least:
            raise BadMessage(f"k is {request.k}, and the model has {least} ids")

    def require_answerable(self, request: SampleRequest) -> None:
        """Raises UserError for prompts that the model cannot answer in that way."""
        if any(not prompt for prompt in request.prompts):
            raise BadMessage("a prompt has no tokens, so nothing predicts its first answer token")
        self._require_ids(request.prompts)
        if not 0 < request.vocab_size <= self.teacher.vocab_size:
            raise BadMessage(f"vocab_size is {request.vocab_size}, and the model has {self.teacher.vocab_size} ids")
        sampling = sampling_of(request)
        check_positions(self.model, max(map(len, request.prompts)) + sampling.max_new_tokens - 1)

    @torch.no_grad()
    def rows(self, requests: Sequence[RowsRequest]) -> list[bytes]:
        """The rows of each request as safetensors, from one forward pass over the texts of all."""
        sequences = [one for request in requests for one in request.sequences]
        batch = collate(sequences, requests[0].pad_id).to(self.model.device)
        hidden = self.teacher.rows(batch).hidden
        parts = hidden.split([request.count for request in requests])
        return [save(self._form(request, part)) for request, part in zip(requests, parts, strict=True)]

    def sample(self, request: SampleRequest) -> bytes:
        """Answers to the prompts of a request, side by side."""
        models = replace(
            self.rollouts.models, vocab_size=request.vocab_size, eos_ids=tuple(request.eos_ids), pad_id=request.pad_id
        )
        answers = self.rollouts.over(models).sample(
            request.prompts,
            sampling_of(request),
            keys=request.keys,
            seed=request.seed,
            draw=request.draw,
            batch_size=len(request.prompts),
        )
        return pack_answers(*zip(*((one.response, one.ended, one.logprobs) for one in answers), strict=True))

    def _form(self, request: RowsRequest, hidden: Tensor) -> dict[str, Tensor]:  # (N, H) -> (N, ...) each
        if request.rows == "hidden":
            return {"hidden": hidden.cpu().contiguous()}
        with self.teacher.head() as head:
            own = torch.tensor([token for one in request.sequences for token in one.response], dtype=torch.int64)
            ids, logprobs = likeliest(hidden, _of_ids_below(head, request.vocab_size), request.k, own)
        return {"ids": ids.int().cpu(), "logprobs": logprobs.float().cpu()}

    def _require_ids(self, texts: Sequence[Sequence[int]]) -> None:
        for ids in texts:
            wrong = next((one for one in ids if not 0 <= one < self.ids), None)
            if wrong is not None:
                raise BadMessage(f"a text holds id {wrong}, and the model has the ids 0 to {self.ids - 1}")


def sampling_of(request: SampleRequest) -> Sampling:
    """The way of drawing that a request asks for. Raises UserError for one that there is not."""
    try:
        sampling = Sampling(**request.sampling)
    except TypeError as error:
        raise BadMessage(f"sampling: {error}") from None
    whole = ("max_new_tokens", "top_k", "no_repeat_ngram_size")
    if sampling.alpha or any(type(getattr(sampling, name)) is not int for name in whole):
        raise BadMessage(f"sampling: {', '.join(whole)} must be whole numbers, and alpha 0: there is one model here")
    return sampling


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of an architecture and of SAMPLED evenly spaced elements of every weight, in the dtype that it has here.

    A model that was trained a step further has another one; reading all weights of a large model would take minutes.
    """
    keys = {key: value for key, value in model.config.to_dict().items() if key not in _OF_THE_FILE}
    found = hashlib.sha256(json.dumps([type(model).__name__, keys], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), SAMPLED), dtype=torch.float64).long()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# Keys of a configuration that say where it came from and how it is run, and nothing of what the model computes.
_OF_THE_FILE = {"_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation", "use_cache"}


def _of_ids_below(head: LMHead, size: int | None) -> LMHead:
    if size is None or size >= len(head.weight):
        return head
    return replace(head, weight=head.weight[:size], bias=None if head.bias is None else head.bias[:size])
