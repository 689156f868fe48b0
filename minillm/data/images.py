"""Pictures in prompts: where records name them, how they are read, and what a model's processor makes of them.

A picture is a path beside the file of its record, a data: URI, or bytes of a Parquet file or a dataset. Every one is
opened while data is loaded, so that a missing or broken one is named before anything is trained; its pixels are made
anew when a batch needs them, and kept as long as there is room.
"""

import base64
import binascii
import io
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.processing_utils import ProcessorMixin

from minillm.data.sources import DataError
from minillm.models.processors import placeholder_ids
from minillm.models.tokenizers import Message

FIELDS = ("image", "images")
MARK = "<image>"  # in a text, where a picture of the record's own field stands
KEPT_BYTES = 512 * 2**20  # of pixels that were made already
# What processors say of pictures, part by part, so that those of a batch stand one after the other.
KNOWN = {
    "pixel_values",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_sizes",
    "batch_num_images",
    "spatial_shapes",
    "image_position_ids",
}
_ON_ITS_SIDE = (5, 6, 7, 8)  # orientations in which a picture is stored
OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


@dataclass(frozen=True)
class Picture:
    """One picture that a record shows, not read yet."""

    record: str  # where it stands
    name: str  # its path, or what else it is
    read: Callable[[], bytes]

    def open(self, max_pixels: int) -> Image.Image:
        """The picture as it is looked at, in RGB. Raises DataError where it is missing, broken or too large."""
        with self._opened() as image:
            if image.width * image.height > max_pixels:
                raise DataError(
                    f"{self._where}: {image.width} x {image.height} pixels, more than max_image_pixels={max_pixels:,}; make "
                    "it smaller, or raise that"
                )
            return ImageOps.exif_transpose(image).convert("RGB")

    def size(self) -> tuple[int, int]:
        """Width and height of the picture as it is looked at. Raises DataError where it is missing, or no picture."""
        with self._opened() as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
            return (image.height, image.width) if turned else (image.width, image.height)

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        """The picture as it is stored, whose pixels are not read yet."""
        try:
            with Image.open(io.BytesIO(self.read())) as image:
                yield image
        except FileNotFoundError:
            raise DataError(f"{self._where}: no such file") from None
        except UnidentifiedImageError:
            raise DataError(f"{self._where}: not a picture that Pillow knows") from None
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._where}: cannot be read ({error}); it is cut off or damaged") from None

    @property
    def _where(self) -> str:
        return f"{self.record}: picture {self.name}"


def find_pictures(where: str, folder: Path, record: Mapping[str, Any]) -> list[Picture]:
    """The pictures of a record's own field, `image` or `images`. `folder` is what their paths count from."""
    found = []
    for field in FIELDS:
        value = record.get(field)
        values = [] if value is None else value if isinstance(value, list) else [value]
        found += [_picture(where, folder, field, one) for one in values]
    return found


def pictures_of(where: str, folder: Path, record: Mapping[str, Any]) -> list[Picture]:
    """All pictures that the prompt of a record shows, none of which is opened. Raises DataError for what is no picture."""
    # messages, chosen, rejected: two of these may have the same prompt
    placed = [_placed(where, folder, value) for value in record.values() if isinstance(value, list)]
    return [*find_pictures(where, folder, record), *max(placed, key=len, default=[])]


def _placed(where: str, folder: Path, messages: Sequence[Any]) -> list[Picture]:
    contents = [one.get("content") for one in messages if isinstance(one, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    sources = [_source(part) for part in parts if part.get("type") in ("image", "image_url")]
    return [_picture(where, folder, "messages", source) for source in sources if source is not None]


def shown_in(
    where: str, folder: Path, messages: list[Message], pictures: Sequence[Picture]
) -> tuple[list[Message], list[Picture]]:
    """Messages whose contents have a part of type image for every picture, and the pictures in that order.

    Args:
        messages: as records have them: contents are texts, or lists of parts.
        pictures: of the record's own field; they stand where a text says <image> or an image part names none, and before
            the first question where nothing says where.

    Raises DataError for a part that cannot be shown, and where there are more or fewer places than pictures.
    """
    left, placed, shown = list(pictures), [], []
    split = [_parts(message["content"]) for message in messages]
    open_places = sum(part["type"] == "image" and _source(part) is None for parts in split for part in parts)
    for parts in split if pictures else ():  # without pictures the mark is a text like any other
        marks = sum(part["text"].count(MARK) for part in parts if part["type"] == "text")
        open_places += marks
    if pictures and not open_places:
        asked = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
        split[asked] = [*({"type": "image"} for _ in pictures), *split[asked]]
        open_places = len(pictures)
    if open_places != len(pictures):
        raise DataError(
            f"{where}: {len(pictures)} pictures in {' or '.join(FIELDS)}, but {open_places} places for them"
        )
    for message, parts in zip(messages, split, strict=True):
        content: list[dict[str, Any]] = []
        for part in parts:
            if part["type"] == "image":
                source = _source(part)
                placed.append(left.pop(0) if source is None else _picture(where, folder, "messages", source))
                content.append({"type": "image"})
                continue
            for number, text in enumerate(part["text"].split(MARK) if pictures else [part["text"]]):
                if number:
                    placed.append(left.pop(0))
                    content.append({"type": "image"})
                if text:
                    content.append({"type": "text", "text": text})
        shown.append({**message, "content": content})
    return shown, placed


def as_texts(messages: list[Message], image: str) -> list[Message]:
    """Messages whose contents are texts, with `image` in the place of a picture."""
    return [
        {
            **message,
            "content": "".join(image if part["type"] == "image" else part["text"] for part in message["content"]),
        }
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


class PictureReader:
    """The tensors that a processor makes of prompts that show pictures."""

    def __init__(self, processor: ProcessorMixin, *, max_pixels: int):
        self.processor, self.max_pixels = processor, max_pixels
        self._kept: OrderedDict[object, dict[str, Tensor]] = OrderedDict()
        self._kept_bytes = 0

    def read(
        self, where: str, text: str, pictures: Sequence[Picture], *, special: bool
    ) -> tuple[list[int], Mapping[str, Tensor]]:
        """The ids of a prompt with every picture's placeholders, and what the forward pass takes beside them.

        Raises DataError for a picture that cannot be shown, or a text with more or fewer places than pictures.
        """
        places = text.count(self.processor.image_token)
        if places != len(pictures):
            raise DataError(
                f"{where}: {len(pictures)} pictures, but the prompt says {self.processor.image_token} {places} times, which "
                "stands for one; take it out of the text, or see what the template does with pictures"
            )
        ids, inputs = self._process(where, text, pictures, special)
        key = object()
        self._keep(key, inputs)
        return ids, _Shown(self, key, tuple(inputs), lambda: self._process(where, text, pictures, special)[1])

    def get(self, key: object, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what is kept under a key, or make it again."""
        if key not in self._kept:
            self._keep(key, make())
        self._kept.move_to_end(key)
        return self._kept[key]

    def _keep(self, key: object, inputs: dict[str, Tensor]) -> None:
        self._kept[key] = inputs
        self._kept_bytes += _size(inputs)
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= _size(self._kept.popitem(last=False)[1])

    def _process(
        self, where: str, text: str, pictures: Sequence[Picture], special: bool
    ) -> tuple[list[int], dict[str, Tensor]]:
        images = [picture.open(self.max_pixels) for picture in pictures]
        try:
            made = self.processor(images=[images], text=[text], add_special_tokens=special, return_tensors="pt")
        except ValueError as error:  # a side of a few pixels, a strip
            raise DataError(f"{where}: the model's processor refuses {_names(pictures)}: {error}") from None
        inputs = {name: one for name, one in made.items() if name not in OF_TOKENS}
        unknown = sorted(name for name, one in inputs.items() if name not in KNOWN or not isinstance(one, Tensor))
        if unknown:
            raise DataError(
                f"{type(self.processor).__name__} gives {', '.join(unknown)} with its pictures, which minillm does not know "
                "how to put into batches; choose a model of another architecture"
            )
        ids = made["input_ids"][0]
        self._check_kinds(ids, made)
        return ids.tolist(), inputs

    def _check_kinds(self, ids: Tensor, made: Mapping[str, Tensor]) -> None:  # (L,)
        """Token kinds are made from ids again in every batch: they must be what the processor says."""
        expected = torch.isin(ids, torch.tensor(sorted(placeholder_ids(self.processor)))).long()
        for name in ("mm_token_type_ids", "token_type_ids"):
            kinds = made.get(name)
            if kinds is not None and kinds.any() and not torch.equal(kinds[0].long(), expected):
                raise DataError(
                    f"{type(self.processor).__name__} tells tokens apart by {name} in a way that minillm does not know; choose a "
                    "model of another architecture"
                )


class _Shown(Mapping[str, Tensor]):
    """The extras of one prompt, made when they are looked at."""

    def __init__(
        self, reader: PictureReader, key: object, names: tuple[str, ...], make: Callable[[], dict[str, Tensor]]
    ):
        self._reader, self._key, self._names, self._make = reader, key, names, make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._reader.get(self._key, self._make)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _source(part: Mapping[str, Any]) -> Any:
    """The picture that a part of type image shows, under the names that templates and APIs have for it; None where it says nothing."""
    for name in ("image", "path", "url", "image_url"):
        value = part.get(name)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is not None:
            return value
    return None


def _picture(where: str, folder: Path, field: str, value: Any) -> Picture:
    if isinstance(value, Picture):
        return Picture(where, value.name, value.read)
    if isinstance(value, bytes):
        return Picture(where, f"in {field}", lambda: value)
    if isinstance(value, dict) and {"bytes", "path"} & set(value):
        if value.get("bytes") is not None:
            return Picture(where, value.get("path") or f"in {field}", lambda: value["bytes"])
        value = value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        return Picture(where, f"data: URI in {field}", lambda: _decode(where, field, value))
    if isinstance(value, str) and "://" in value:
        raise DataError(
            f"{where}: {field}: {value[:80]} is an address, and nothing is fetched; give a path or a data: URI"
        )
    if isinstance(value, str) and value:
        path = folder / Path(value).expanduser()
        return Picture(where, str(path), path.read_bytes)
    raise DataError(
        f"{where}: {field}: expected a path, a data: URI or the bytes of a picture, found {type(value).__name__}"
    )


def _decode(where: str, field: str, uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{where}: {field}: a data: URI without base64; expected data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: {field}: a data: URI that is not base64 ({error})") from None


def _names(pictures: Sequence[Picture]) -> str:
    return ", ".join(picture.name for picture in pictures)


def _size(inputs: Mapping[str, Tensor]) -> int:
    return sum(one.nbytes for one in inputs.values())
