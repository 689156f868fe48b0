"""Teachers whose weights are not loaded: the size of a cache before it is written, and what of a cached or a served one is in
memory where a student learns from it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from minillm import UserError
from minillm.config.data import DataConfig
from minillm.config.loader.run_plan import Stage
from minillm.config.models import AnyTeacherConfig, CachedTeacherConfig, ModelConfig, ServedTeacherConfig
from minillm.config.paths import BYTE_TOKENIZER, CACHE, STAGE, expand, is_hub_name
from minillm.data.corpus import block_text, load_corpus
from minillm.data.instructions import load_prompts
from minillm.models.access import lm_head
from minillm.models.tokenizers import load_tokenizer
from minillm.planning.architectures import Architectures
from minillm.planning.sizes import ModelSize, build
from minillm.teachers.minillm_servers import MinillmServers
from minillm.teachers.row_cache import digest_of, find_cache
from minillm.teachers.row_storage import RowStorage
from minillm.teachers.server_pool import TeacherAway

BYTES_PER_TEXT = 68  # 32 in its shard, 36 in the index


@dataclass(frozen=True)
class TeacherHead:
    """The part of a cached or a served teacher that is in memory: its head, and the rows of a step."""

    vocab_size: int | None  # None where it is known to the tokenizer alone
    hidden_size: int
    itemsize: int  # bytes of a weight of the head
    k: int = 0  # ids of a row; 0: rows are hidden states

    @property
    def size(self) -> ModelSize:
        """Counts of a model that is a head alone. A row of ids takes as much as one of numbers of 4 bytes, 3 k of them."""
        head = 0 if self.k else self.vocab_size * self.hidden_size
        return ModelSize(
            parameters=head,
            itemsize=4 if self.k else self.itemsize,
            stored_bytes=head * self.itemsize,
            head=head,
            embeddings=0,
            layers=0,
            largest_layer=0,
            hidden_size=3 * self.k or self.hidden_size,
            kv_bytes_per_token=0,
            trained=0,
        )


@dataclass(frozen=True)
class CacheSize:
    """The files that a stage of method cache will write: rows, index and head."""

    bytes_per_row: int
    head_bytes: int
    texts: int | None = None  # None where the data cannot be read without the run
    rows: int | None = None
    at_most: bool = False  # answers count at their longest

    @property
    def total(self) -> int | None:
        """Bytes of all files, None where that is not known."""
        if self.rows is None:
            return None
        return self.rows * self.bytes_per_row + self.texts * BYTES_PER_TEXT + self.head_bytes


def head_of(teacher: AnyTeacherConfig | None, architectures: Architectures, output_dir: Path) -> TeacherHead | None:
    """The part of a teacher that is in memory, None where its weights are loaded or there is none.

    Raises UserError where neither the cache nor the stage that will write it is known, and where no server of a served one
    answers and nothing else says which model it is.
    """
    if isinstance(teacher, ServedTeacherConfig):
        return _served_head(teacher, architectures)
    if not isinstance(teacher, CachedTeacherConfig):
        return None
    path = expand(teacher.path)
    writer = architectures.stages.get(path.removeprefix(STAGE)) if path.startswith(STAGE) else None
    if writer is not None:
        vocab_size, hidden_size = _head_of(writer, architectures)
        keys, dtype = writer.config.method, getattr(torch, writer.config.teacher.dtype)
        return TeacherHead(vocab_size, hidden_size, dtype.itemsize, keys.k if keys.rows == "top_k" else 0)
    said = json.loads((find_cache(teacher.path, output_dir) / CACHE).read_text(encoding="utf-8"))
    k = said["storage"]["size"] if said["storage"]["rows"] == "top_k" else 0
    return TeacherHead(said["vocab_size"], said["hidden_size"], getattr(torch, said["head_dtype"]).itemsize, k)


def _served_head(teacher: ServedTeacherConfig, architectures: Architectures) -> TeacherHead:
    """The head of a served teacher, as a server describes it; where none answers, as teacher.model says, in fp32."""
    k = teacher.k if teacher.rows == "top_k" else 0
    if teacher.protocol == "openai":
        return TeacherHead(None, 0, 4, k)
    pool = MinillmServers(teacher.model_copy(update={"patience_seconds": 0.0}))
    try:
        said = pool.described
        return TeacherHead(said["vocab_size"], said["hidden_size"], getattr(torch, said["dtype"]).itemsize, k)
    except TeacherAway as error:
        if teacher.model is None:
            raise UserError(f"{error}; a plan without a server takes its sizes from teacher.model") from None
        return TeacherHead(*_head_sizes(architectures.named(teacher.model)), torch.float32.itemsize, k)
    finally:
        pool.close()


def cache_size(stage: Stage, architectures: Architectures, output_dir: Path) -> CacheSize | None:
    """The size of what a stage will write, None where it writes no cache. Its data is read and tokenised for that."""
    keys = stage.config.method
    if keys.needs().result != "rows":
        return None
    vocab_size, hidden_size = _head_of(stage, architectures)
    storage = RowStorage(keys.rows, keys.dtype, keys.k if keys.rows == "top_k" else hidden_size)
    itemsize = getattr(torch, stage.config.teacher.dtype).itemsize
    head_bytes = vocab_size * hidden_size * itemsize if keys.rows == "hidden" else 0
    tokenizer = _tokenizer_keys(stage, architectures)
    if tokenizer is None or not _is_here(stage.config.data, keys.texts):
        return CacheSize(storage.bytes_per_row, head_bytes)
    rows, known = 0, set()
    for digest, count in _texts(stage, load_tokenizer(tokenizer, output_dir)):
        if count and digest not in known:
            known.add(digest)
            rows += count
    return CacheSize(storage.bytes_per_row, head_bytes, len(known), rows, "answers" in keys.texts)


def _texts(stage: Stage, tokenizer) -> Iterator[tuple[bytes, int]]:
    """(digest, rows) of every text that the teacher will read; answers are stood for by one as long as they may be."""
    config = stage.config
    kinds = config.method.texts
    if {"references", "answers"} & set(kinds):
        for example in load_prompts(config.data.prompts, tokenizer):
            if "references" in kinds:
                yield digest_of(example.sequence), len(example.response_ids)
            if "answers" in kinds:
                longest = [-1] * config.rollout.max_new_tokens
                yield digest_of(example.answered(longest)), len(longest)
    if "corpus" in kinds:
        for block in load_corpus(config.data.corpus, tokenizer).blocks:
            yield digest_of(block_text(block)), len(block) - 1


def _head_of(stage: Stage, architectures: Architectures) -> tuple[int, int]:
    """Rows and columns of the head of a stage's teacher."""
    return _head_sizes(architectures.teacher(stage))


def _head_sizes(architecture: PreTrainedConfig) -> tuple[int, int]:
    with FakeTensorMode():
        return tuple(lm_head(build(architecture, "bfloat16", "eager")).weight.shape)


def _tokenizer_keys(stage: Stage, architectures: Architectures) -> ModelConfig | None:
    """The keys of the model whose tokenizer reads a stage's data; None where that is not here yet."""
    config = stage.config.student_side
    while config.tokenizer is None and (config.path or "").startswith(STAGE):
        earlier = architectures.stages.get(config.path.removeprefix(STAGE))
        if earlier is None:
            return None
        config = earlier.config.student_side
    place = config.tokenizer or config.path or ""
    return config if place == BYTE_TOKENIZER or not is_hub_name(expand(place)) else None


def _is_here(data: DataConfig, kinds: list[str]) -> bool:
    """True for data that can be read without a network and without what an earlier stage leaves."""
    sources = [data.corpus] * ("corpus" in kinds) + [data.prompts] * bool({"references", "answers"} & set(kinds))
    paths = [expand(getattr(source, "path", "")) for source in sources]
    return not any(
        path.startswith(STAGE) or source.type == "hf" and is_hub_name(path)
        for source, path in zip(sources, paths, strict=True)
    )
