"""Several teachers in a plan: each with its weights or its head, and all of them as the sizes of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from minillm.config.models import Quantization
from minillm.planning.cached_teacher import TeacherHead
from minillm.planning.places import HOME
from minillm.planning.sizes import ModelSize


@dataclass(frozen=True)
class BesideTeacher:
    """A teacher beside the first of several."""

    name: str
    architecture: PreTrainedConfig | None = field(compare=False)  # None where of its weights the head alone is here
    text: str  # the architecture as JSON, by which two are compared
    head: TeacherHead | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    quantization: Quantization | None = None
    place: str = HOME  # minillm.planning.places.place_of


@dataclass(frozen=True)
class Several:
    """The teachers of a stage: the first, which stands where one would, and those beside it."""

    first: str  # its name
    beside: tuple[BesideTeacher, ...]
    divided: bool  # each record has one of them; otherwise all judge every record
    # steps that each reads in its turn, where the weights of one are in memory at a time, and the heads of all; None: all are
    turn_steps: int | None = None

    @property
    def asked(self) -> float:
        """The part of them that judges a record, where each has as many."""
        return 1 / (1 + len(self.beside)) if self.divided else 1.0

    def row_bytes(self, sizes: Sequence[ModelSize]) -> int:
        """Bytes of what is kept of a row: the widest teacher's and whose it is, or that of all."""
        if self.divided:
            return max(size.hidden_size for size in sizes) * max(size.itemsize for size in sizes) + 8
        return sum(size.hidden_size * size.itemsize for size in sizes)


def together(sizes: Sequence[ModelSize]) -> ModelSize:
    """Models that all are in memory as one: a pass through it takes the FLOPs of a pass through each."""
    layers = sum(size.layers for size in sizes)
    widths = sum(size.hidden_size * max(size.layers, not layers) for size in sizes)
    return ModelSize(
        parameters=sum(size.parameters for size in sizes),
        itemsize=max(size.itemsize for size in sizes),
        stored_bytes=sum(size.stored_bytes for size in sizes),
        head=sum(size.head for size in sizes),
        embeddings=sum(size.embeddings for size in sizes),
        layers=layers,
        largest_layer=max(size.largest_layer for size in sizes),
        hidden_size=round(widths / (layers or len(sizes))),
        kv_bytes_per_token=sum(size.kv_bytes_per_token for size in sizes),
        trained=0,
        idle=sum(size.idle for size in sizes),
        pictures=sum(size.pictures for size in sizes),
    )
