"""The decode loop whose tensors grow and shrink: attention over the tokens that are there, rows that ended leave."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minillm.distributed import collectives
from minillm.models.batch import join_extras
from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.delta_stream import SummedDecoder
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache
from minillm.rollout.local.ngrams import NgramBan
from minillm.rollout.local.token_drawing import Answer, PartialAnswers, Sampling, choose, pad_left
from minillm.teachers.pair import Models

ENDED_FRACTION = 0.25  # of a batch: when so many rows have ended, dropping them repays the copy of the caches


def decode(
    models: Models,
    sampling: Sampling,
    roles: Mapping[str, float],  # the models that take part, and their weights
    prompts: Sequence[list[int]],
    noise: Tensor,  # (B, max_new_tokens) float64, CPU
    extras: Sequence[Mapping[str, Tensor]] = (),  # what each prompt shows beside its ids
) -> list[Answer]:
    """The answers of one batch. Rows run on until all have ended; those that have ended leave in groups.

    Raises UserError for logits that are not finite.
    """
    device, batch, steps = models.device, len(prompts), sampling.max_new_tokens
    width = max(map(len, prompts))
    room = width + steps - 1
    members = [models.model(role) for role in roles]
    caches = [make_cache(model, lambda: RoomyLayer(room)) for model in members]
    decoders: list[Decoder | SummedDecoder] = [
        Decoder(model, cache, vocab_size=models.vocab_size) for model, cache in zip(members, caches, strict=True)
    ]
    if models.delta is not None:
        decoders = [
            SummedDecoder(decoder, models.delta, room=room) if role == "student" else decoder
            for role, decoder in zip(roles, decoders, strict=True)
        ]
    weights = list(roles.values())
    bans = NgramBan(sampling.no_repeat_ngram_size, prompts) if sampling.no_repeat_ngram_size else None
    noise = noise.to(device)
    writing = PartialAnswers(models, roles, batch, steps)

    fed, padding, position = (part.to(device) for part in pad_left(prompts, width, models.pad_id))
    mask = (torch.arange(room, device=device) >= padding).long()
    rows = torch.arange(batch, device=device)  # of the answers, still in the batch

    shown = {name: tensor.to(device) for name, tensor in join_extras(extras).items()}  # the caches remember them
    for step in range(steps):
        logits = [decoder.forward(fed, mask[:, : width + step], position, shown) for decoder in decoders]
        shown = {}
        if bans is not None:
            logits = [bans.apply(one) for one in logits]
        token, logprob = choose(logits, weights, sampling, noise[:, step])
        writing.put(rows, writing.places[step : step + 1], token, logprob)
        left = writing.look(step, step + 1)
        if step + 1 == steps or not (collectives.anywhere(left > 0) if models.by_layers else left):
            break
        if bans is not None:
            bans.append(token.tolist())
        fed, position = token[:, None], position[:, -1:] + 1
        if left and len(rows) - left >= ENDED_FRACTION * len(rows):
            kept = (~writing.ended[rows]).nonzero()[:, 0]
            for decoder in decoders:
                decoder.keep(kept)
            if bans is not None:
                bans.keep(kept.tolist())
            fed, mask, position, noise, rows = (part[kept] for part in (fed, mask, position, noise, rows))
    return writing.answers(prompts)
