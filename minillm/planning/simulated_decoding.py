"""Sampling on fake tensors, as the decode loops of minillm.rollout.local hold memory: prompts, then the last token that is fed,
through the models that sample, with their caches and what waits for a row."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minillm.models.access import forward_decoder, forward_shown, lm_head
from minillm.models.families import cache_argument, cache_mask
from minillm.models.modes import sampling_mode
from minillm.planning.few_layers import FEW
from minillm.planning.ledger import Ledger
from minillm.planning.loss import LossShape, statistics_twin
from minillm.planning.simulated_models import SimulatedModels
from minillm.planning.simulated_texts import SimulatedTexts, mask
from minillm.planning.work import Decoding
from minillm.rollout.local.distribution import padded_size
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache


class SimulatedDecoding:
    """See the module.

    Args:
        losses: where the shape of statistics is noted that are measured while answers are sampled.
    """

    def __init__(
        self,
        simulated: SimulatedModels,
        texts: SimulatedTexts,
        device: torch.device,
        ledger: Ledger,
        losses: dict[str, LossShape],
    ):
        self.simulated, self.texts, self.device, self.ledger, self.losses = simulated, texts, device, ledger, losses
        self.models, self.vocab_size = simulated.by_name, simulated.vocab_size

    def take(self, decoding: Decoding) -> None:
        """The answers of a batch, from their prompts to the last token. Notes the bytes of a token in each model's cache."""
        models = [self.models[name] for name in decoding.models]
        room, prompts = decoding.room, -(-decoding.batch // decoding.per_prompt)
        # a teacher alone answers where it is
        home = self._at(decoding.models[0]) if len(models) == 1 else nullcontext()
        with home, sampling_mode(models), self.simulated.few_layers(decoding.models) as left_out:
            missing = {}  # bytes of a token in the layers that are left out
            for name in decoding.models:
                cache = self._cache(name, room)
                self._decode(name, cache, prompts, decoding.prompt, 0)
                held = sum(tensor.untyped_storage().nbytes() for tensor in _stored(cache))
                missing[name] = held * left_out[name] // FEW // (prompts * room)
                self.simulated.kv_bytes[name] = held // (prompts * room) + missing[name]
                del cache

            def missing_layers(rows: int, tokens: int) -> list[Tensor]:
                held = []
                for name, size in missing.items():
                    with self.ledger.part(f"{name} KV cache"), self._at(name):
                        held.append(torch.empty(rows * tokens * size, dtype=torch.uint8))
                return held

            rest = missing_layers(prompts, room)
            caches = [self._cache(name, room) for name in decoding.models]
            if decoding.teacher_share is not None:
                self._read_by_blocks(decoding, caches)
                return

            def feed(caches: list, rows: int, fed: int, seen: int) -> None:
                logits = []
                for name, cache in zip(decoding.models, caches, strict=True):
                    self._decode(name, cache, rows, fed, seen)
                    with self.ledger.part("sampling buffers"):
                        logits.append(torch.empty(decoding.batch, padded_size(self.vocab_size)))

            feed(caches, prompts, decoding.prompt, 0)
            if prompts < decoding.batch:  # each is read once, and its row copied for every answer to it
                rest = missing_layers(decoding.batch, room)
                for name, cache in zip(decoding.models, caches, strict=True):
                    cache.reorder_cache(torch.zeros(decoding.batch, dtype=torch.int64))
                    self.ledger.relabel(_stored(cache), f"{name} KV cache")
            before, moment = self.ledger.total, self.ledger.moment
            feed(caches, decoding.batch, 1, room - 1)  # the last token that is fed
            kept = None
            if decoding.cuda_graphs:  # they keep the memory of a step, beside which the next prompts are read
                kept = torch.empty(self.ledger.most_since(moment) - before, dtype=torch.uint8)
            if decoding.ahead:
                waiting = [self._cache(name, decoding.prompt) for name in decoding.models]
                rest += missing_layers(decoding.ahead, decoding.prompt)
                feed(waiting, decoding.ahead, decoding.prompt, 0)
                if kept is None:  # otherwise a step has its memory
                    feed(caches, decoding.batch, 1, room - 1)
                del waiting
            elif decoding.cuda_graphs:
                feed(caches, decoding.batch, decoding.prompt, 0)
            del kept

    def _read_by_blocks(self, decoding: Decoding, caches: list) -> None:
        """minillm.rollout.local.coin_loop: prompts, the last block of each model, and statistics without the caches."""
        states, logits = [], []
        for name, cache in zip(decoding.models, caches, strict=True):
            self._decode(name, cache, decoding.batch, decoding.prompt, 0)
            with self.ledger.part("sampling buffers"):
                head = lm_head(self.models[name]).weight
                states.append(torch.empty(decoding.batch, decoding.answer, head.shape[1], dtype=head.dtype))
                logits.append(torch.empty(decoding.batch, padded_size(self.vocab_size)))
        for name, cache in zip(decoding.models, caches, strict=True):
            self._decode(name, cache, decoding.batch, decoding.block, decoding.room - decoding.block)
        caches.clear()
        del cache, logits
        rows = decoding.batch * decoding.answer
        with self.ledger.part("sampling buffers"):
            hidden = []
            while states:  # the teacher's first
                hidden.append(torch.empty(rows, states[-1].shape[-1], dtype=states[-1].dtype))
                states.pop()
        shape = LossShape(rows, self.vocab_size, len(decoding.models), self.device)
        self.losses["rollout"] = shape
        with self.ledger.part("loss buffers"):
            statistics_twin(hidden[0], shape)

    def _cache(self, name: str, room: int):
        ledger = self.ledger

        class Layer(RoomyLayer):
            def lazy_initialization(self, *states: Tensor) -> None:
                with ledger.part(f"{name} KV cache"):
                    super().lazy_initialization(*states)

        return make_cache(self.models[name], lambda: Layer(room))

    def _decode(self, name: str, cache, batch: int, fed: int, seen: int) -> None:
        with self._at(name):
            self._read(name, cache, batch, fed, seen)

    def _read(self, name: str, cache, batch: int, fed: int, seen: int) -> None:
        for layer in cache.layers:
            if isinstance(layer, RoomyLayer) and layer.is_initialized:
                layer.use(seen)
        shows = not seen and self.texts.shows(fed)
        ids = self.texts.ids(name, batch, fed, shows=shows)
        seen_mask = mask(batch, seen + fed)
        positions = torch.arange(seen, seen + fed).expand(batch, fed)
        cached = {cache_argument(self.models[name]): cache, "use_cache": True}
        if seen:
            forward_decoder(self.models[name], ids, cache_mask(self.models[name], seen_mask, fed), positions, **cached)
        else:
            shown = self.texts.shown(batch) if shows else {}
            forward_shown(self.models[name], ids, seen_mask, positions, shown, prompt=seen_mask.bool(), **cached)
        self.ledger.relabel(_stored(cache), f"{name} KV cache")

    def _at(self, name: str) -> AbstractContextManager[None]:
        return self.ledger.at(self.simulated.place(name))


def _stored(cache) -> list[Tensor]:
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return [state for state in states if isinstance(state, Tensor)]
