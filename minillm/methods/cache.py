"""The cache of a teacher (minillm/teachers/row_cache.py): what it says of given texts, written to disk once.

A later stage, or another run, learns from that with no teacher in memory. Hidden states and the head give every
divergence over the full vocabulary; likeliest ids give it over k + 1 outcomes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillm.data.corpus import block_text
from minillm.data.fingerprints import template_fingerprint, texts_fingerprint, tokenizer_fingerprint
from minillm.data.instructions import Example
from minillm.distributed import collectives
from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.written_answers import ARCHIVE, OF_THE_TEACHER, written_answers
from minillm.models.access import plain_head, row_hidden
from minillm.models.batch import TokenSequence, collate
from minillm.models.families import banned_id
from minillm.models.processors import processor_of
from minillm.models.tokenizers import end_ids
from minillm.rollout.rollouts import Sampling
from minillm.storage.atomic import sync
from minillm.teachers.cached import head_bytes
from minillm.teachers.pair import Models
from minillm.teachers.row_cache import ANSWERS, HEAD, TOKENIZER, Parts, digest_of
from minillm.teachers.row_shards import Piece, RowShards
from minillm.teachers.row_storage import RowStorage, StorageError

MIB = 2**20


class LazyTexts(Sequence[TokenSequence]):
    """Texts that are made when they are asked for: several kinds, one after the other."""

    def __init__(self, *kinds: tuple[Sequence[Any], Callable[[Any, int], TokenSequence]]):
        """Args: kinds: what each is made of, and the way from an item and its place to a text."""
        self._kinds = [(items, make) for items, make in kinds if len(items)]
        self._ends = np.cumsum([len(items) for items, _ in self._kinds])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, place: int) -> TokenSequence:
        kind = int(np.searchsorted(self._ends, place, side="right"))
        if place < 0 or kind == len(self._kinds):
            raise IndexError(f"text {place} of {len(self)}")
        items, make = self._kinds[kind]
        own = place - (int(self._ends[kind - 1]) if kind else 0)
        return make(items[own], own)


class TeacherCache(Method):
    """See the module. The texts of a shard are read side by side, at most train.per_device_train_batch_size of them, those
    of a like length together; shards are dealt to the ranks, and each is the same whoever writes it."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> Sequence[Item]:
        raise TypeError("a stage of cache takes no step, so that there is nothing to collect")

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        raise TypeError("a stage of cache takes no step, so that it has no loss")

    def prepare(self, data: TrainingData, models: Models, folder: Path) -> None:
        keys = self.config.method
        with models.teacher.head() as head:
            size = keys.k if keys.rows == "top_k" else head.weight.shape[1]
        shards = RowShards(
            data.folder / "rows", RowStorage(keys.rows, keys.dtype, size), shard_bytes=keys.shard_mib * MIB
        )
        finished = collectives.on_rank_0(lambda: shards.prepare(self._written_by(data)))
        texts = self._texts(data, models)
        everything = LazyTexts(*((kind, lambda text, place: text) for kind in texts.values()))
        pieces = shards.pieces(everything, finished)
        written = collectives.on_rank_0(lambda: [shards.is_written(piece) for piece in pieces])
        with models.reading("teacher"):
            missing = [piece for piece, there in zip(pieces, written, strict=True) if not there]
            collectives.together(lambda: self._write(missing, everything, shards, data, models))
            collectives.barrier()

        def publish() -> None:
            numbers = shards.finish(finished, pieces)
            if keys.rows == "hidden":
                # `save_file` lets nobody else read it
                (folder / HEAD).write_bytes(head_bytes(plain_head(models.teacher.model)))
            (processor_of(models.tokenizer) or models.tokenizer).save_pretrained(folder / TOKENIZER)
            if "answers" in keys.texts:
                (folder / ANSWERS).write_bytes((data.folder / ARCHIVE).read_bytes())
                sync(folder / ANSWERS)
            shards.publish(numbers, folder, self._described(data, models, texts))

        collectives.on_rank_0(publish)

    def _texts(self, data: TrainingData, models: Models) -> dict[str, LazyTexts]:
        """The texts by their kinds, in the order of method.texts."""
        examples = [] if data.prompts is None else data.prompts.items
        found = {}
        for kind in self.config.method.texts:
            if kind == "references":
                found[kind] = LazyTexts((examples, lambda example, place: example.sequence))
            elif kind == "answers":
                found[kind] = LazyTexts((examples, self._answered(data, models)))
            else:
                found[kind] = LazyTexts((data.corpus.items, block_text))
        return found

    def _answered(self, data: TrainingData, models: Models) -> Callable[[Example, int], TokenSequence]:
        """The way from a prompt to its text with the answer that the teacher writes."""
        asked = [example.answered([]) for example in data.prompts.items]
        answers = written_answers(asked, data, models, self.config, temperature=self.config.rollout.temperature)
        return lambda example, place: example.answered(answers[example.index])

    def _write(
        self,
        missing: Sequence[Piece],
        texts: Sequence[TokenSequence],
        shards: RowShards,
        data: TrainingData,
        models: Models,
    ) -> None:
        total = sum(len(piece.texts) for piece in missing)
        done = 0
        for place in collectives.rank_slice(len(missing)):
            piece = missing[place]
            rows, error = self._rows([texts[one] for one in piece.texts], shards.storage, models)
            shards.write(piece, rows, error)
            done += len(piece.texts) * collectives.world_size()  # about as many are done by the others
            data.report_progress("texts read by the teacher", min(done, total), total)

    @torch.no_grad()
    def _rows(
        self, texts: Sequence[TokenSequence], storage: RowStorage, models: Models
    ) -> tuple[list[Parts], StorageError]:
        """The stored rows of every text of a shard, and the error that storing adds."""
        order = sorted(range(len(texts)), key=lambda place: texts[place].width)
        size, error = self.config.train.per_device_train_batch_size, StorageError()
        rows: list[Parts] = [{} for _ in texts]
        with models.teacher.head() as head:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                batch = collate([texts[place].read_by_teacher() for place in chosen], models.pad_id).to(models.device)
                hidden = row_hidden(models.teacher.model, batch)  # (N, H)
                parts = storage.encode(hidden, head)
                error.add(storage, hidden, parts, head)
                for name, part in parts.items():
                    for place, of_text in zip(chosen, batch.split(part.cpu()), strict=True):
                        rows[place][name] = of_text
        return rows, error

    def _written_by(self, data: TrainingData) -> dict:
        """The settings that all rows of a cache have in common, in words that JSON knows."""
        config, keys = self.config, self.config.method
        written_by = {
            "teacher": config.teacher.model_dump(mode="json", include={*OF_THE_TEACHER, "tokenizer"}),
            "storage": [keys.rows, keys.dtype, keys.k if keys.rows == "top_k" else None],
            "tokenizer": tokenizer_fingerprint(data.tokenizer),
            "template": template_fingerprint(data.tokenizer),
        }
        if "answers" in keys.texts:
            rollout = config.rollout
            sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p)
            written_by["sampling"] = {**asdict(sampling), "seed": config.seed}
        return written_by

    def _described(self, data: TrainingData, models: Models, texts: dict[str, LazyTexts]) -> dict:
        with models.teacher.head() as head:
            rows, width, dtype = *head.weight.shape, str(head.weight.dtype).removeprefix("torch.")
        return {
            **self._written_by(data),
            "texts": self.config.method.texts,
            "data": self.config.data.model_dump(mode="json"),
            "fingerprints": {kind: texts_fingerprint(map(digest_of, found)) for kind, found in texts.items()},
            "architecture": type(models.teacher.model).__name__,
            "vocab_size": rows,
            "hidden_size": width,
            "head_dtype": dtype,
            "picture_id": banned_id(models.teacher.model),
            "end_ids": list(end_ids(models.teacher.model, models.tokenizer)),
        }


METHOD = TeacherCache
