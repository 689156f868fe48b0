"""The picture that stands for all pictures of a stage's prompts in a plan, the largest that they may show, and what the
student's image processor makes of it.

A picture's tokens count in `max_prompt_length`, beyond which a run leaves prompts out: so does a plan. Where the data's
pictures are not here, the largest square is taken that a prompt has room for.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from minillm import UserError
from minillm.config.data import EasyVqaSource, HfSource, JsonlSource, Pairs, ParquetSource, Prompts
from minillm.config.loader.run_plan import Stage
from minillm.config.paths import STAGE, expand, is_hub_name
from minillm.config.root import StageConfig
from minillm.data.images import KNOWN, Picture, pictures_of
from minillm.data.instructions import records_of
from minillm.data.sources import DataError, Place
from minillm.models.access import REFUSALS
from minillm.models.families import opens_pictures
from minillm.planning.architectures import Architectures
from minillm.planning.known_values import VALUES_NEEDED, KnownValues
from minillm.planning.picture_passes import PictureInputs, tokens_of
from minillm.planning.sizes import build

LOOKED_AT = 1000  # records of a set, from the first on
SMALLEST, LARGEST = 64, 4096  # pixels of a side, of the squares that are tried where the data's pictures are not here
WIDE = 1024, 512  # a picture that is neither small nor a square
HALVINGS = 4  # between a square that there is room for and one twice as wide


@dataclass(frozen=True)
class Found:
    """The pictures that the sets of a stage show, as far as they are here."""

    most: int = 0  # that a prompt shows
    sizes: frozenset[tuple[int, int]] = frozenset()  # width and height of those that are here
    room: int = 0  # tokens of the longest prompt of a set that shows pictures
    max_pixels: int = 0  # of a picture


@dataclass(frozen=True)
class ShownPictures:
    """The pictures of every prompt of a plan, which are all alike."""

    count: int  # that a prompt shows
    said: str  # which ones, for the table
    inputs: PictureInputs  # of the forward pass, for one prompt
    tokens: int  # that a picture takes in a prompt

    def fit(self, length: int) -> bool:
        """True for texts of so many tokens, which begin with one of text and have one after every picture."""
        return self.count * (self.tokens + 1) < length

    def __str__(self) -> str:
        return f"{self.count} in a prompt, of {self.tokens:,} tokens each: {self.said}"


class NotShown(UserError):
    """A reason why the passes over pictures cannot be counted."""


def pictures_found(config: StageConfig, architecture: PreTrainedConfig) -> Found:
    """The pictures that the prompts of a stage show to a model of an architecture, none to one that reads text alone.

    They are those of the first records of each set. A set that is not here, such as one of the hub, counts as one whose
    prompts show a picture each.
    """
    if not opens_pictures(architecture):
        return Found()
    needs, data = config.method.needs(), config.data
    read = {"prompts": data.prompts, "pairs": data.pairs, "forget": data.forget}
    sets = [source for need, source in read.items() if getattr(needs, need)]
    found = [_in_set(source) for source in [*sets, *config.eval.sets.values()] if source is not None]
    return Found(
        max((one.most for one in found), default=0),
        frozenset().union(*(one.sizes for one in found)),
        max((one.room for one in found), default=0),
        max((one.max_pixels for one in found), default=0),
    )


def _in_set(source: Prompts | Pairs) -> Found:
    if not isinstance(source, EasyVqaSource | JsonlSource | ParquetSource | HfSource):  # such as sums, which show none
        return Found()
    limits = source.max_prompt_length, source.max_image_pixels
    path = expand(getattr(source, "path", ""))
    if path.startswith(STAGE) or isinstance(source, HfSource) and is_hub_name(path):
        return Found(1, frozenset(), *limits)
    most, sizes = 0, set()
    try:
        for where, record in islice(records_of(source), LOOKED_AT):
            folder = where.folder if isinstance(where, Place) else Path(".")
            pictures = pictures_of(where, folder, record)
            most = max(most, len(pictures))
            sizes.update(_sizes(pictures))
    except DataError:  # which the run will say
        return Found(max(most, 1), frozenset(sizes), *limits)
    return Found(most, frozenset(sizes), *limits) if most else Found()


def _sizes(pictures: Iterable[Picture]) -> Iterator[tuple[int, int]]:
    for one in pictures:
        try:
            yield one.size()
        except DataError:  # which the run will say
            continue


def shown_pictures(stage: Stage, student: PreTrainedConfig, architectures: Architectures) -> ShownPictures | None:
    """The pictures of a stage's prompts as a plan shows them; None where they show none.

    Raises NotShown where it is not known what the model makes of a picture, and UserError where no picture fits into the
    prompts.
    """
    found = pictures_found(stage.config, student)
    if not found.most:
        return None
    config = stage.config
    try:
        named = config.teacher if config.method.needs().alone else config.student_side
        processor, missing = architectures.image_processor(named), None
    except UserError as error:  # some architectures say themselves how large their pictures are
        processor, missing = None, str(error)
    try:
        return _Trial(student, processor, found).choose()
    except (*REFUSALS, *VALUES_NEEDED) as error:
        if isinstance(error, UserError):
            raise
        refused = (
            f"a {student.model_type} refuses them in a plan ({type(error).__name__}: {' '.join(str(error).split())})"
        )
        raise NotShown(missing or refused) from error


_TRIED: dict[tuple, int] = {}  # tokens of a prompt's pictures: what advice tries differs in nothing that counts here


class _Trial:
    """Pictures of several sizes put to a processor and a model."""

    def __init__(self, student: PreTrainedConfig, processor: BaseImageProcessor | None, found: Found):
        self.student, self.processor, self.found = student, processor, found
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def choose(self) -> ShownPictures:
        if self.processor is None:
            return self._only(_of_one_size(self.student, self.found.most), "as vision_config has their size")
        smallest = self._make(SMALLEST, SMALLEST)
        if smallest == self._make(*WIDE):
            return self._only(smallest, "of one size for this model, whatever theirs is")
        if self.found.sizes:
            return self._of_data()
        return self._largest_square()

    def _only(self, inputs: PictureInputs, said: str) -> ShownPictures:
        self._require_room(inputs)
        return self._shown(inputs, said)

    def _of_data(self) -> ShownPictures:
        made = {}
        for size in largest_of_each_shape(self.found.sizes):
            with suppress(ValueError):  # a strip, or a side of a few pixels, which the run will say
                made[size] = self._make(*size)
        if not made:
            return self._largest_square()
        by_size = sorted(made.items(), key=lambda one: (one[1].pixels, math.prod(one[0])), reverse=True)
        for (width, height), inputs in by_size:
            if self._fits(inputs):
                return self._shown(
                    inputs, f"{width} x {height} pixels, the largest of the data that prompts have room for"
                )
        self._require_room(by_size[-1][1])

    def _largest_square(self) -> ShownPictures:
        most = min(LARGEST, math.isqrt(self.found.max_pixels))
        made = {SMALLEST: self._make(SMALLEST, SMALLEST)}  # of the squares that there is room for
        self._require_room(made[SMALLEST])

        def fits(side: int) -> bool:
            inputs = self._make(side, side)
            if self._fits(inputs):
                made[side] = inputs
            return side in made

        side = SMALLEST
        while 2 * side <= most and fits(2 * side):
            side *= 2
        step = side // 2
        for _ in range(HALVINGS):
            if side + step <= most and fits(side + step):
                side += step
            step //= 2
        side = max(made, key=lambda one: (made[one].pixels, -one))  # the smallest of those of which most is made
        said = (
            f"{side} x {side} pixels, the square that takes most of what prompts have room for: the data's are not here"
        )
        return self._shown(made[side], said)

    def _make(self, width: int, height: int) -> PictureInputs:
        images = [Image.new("RGB", (width, height), "gray")] * self.found.most
        made = self.processor(images=[images], return_tensors="pt")
        return PictureInputs.of({name: one for name, one in made.items() if name in KNOWN})

    def _tokens(self, inputs: PictureInputs) -> int:
        key = self.student.to_json_string(), inputs
        if key not in _TRIED:
            with self._mode, KnownValues():
                _TRIED[key] = tokens_of(self._model, inputs)
        return _TRIED[key]

    @cached_property
    def _model(self) -> PreTrainedModel:
        with self._mode:
            return build(self.student, "bfloat16", "sdpa")

    def _fits(self, inputs: PictureInputs) -> bool:
        return self._shown(inputs, "").fit(self.found.room)

    def _require_room(self, inputs: PictureInputs) -> None:
        if not self._fits(inputs):
            raise UserError(
                f"the pictures of a prompt ({self.found.most}) take {self._tokens(inputs):,} tokens, and it has {self.found.room:,} "
                "with its text: a picture's tokens count in max_prompt_length; raise it"
            )

    def _shown(self, inputs: PictureInputs, said: str) -> ShownPictures:
        return ShownPictures(self.found.most, said, inputs, self._tokens(inputs) // self.found.most)


def largest_of_each_shape(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of pictures whose sides have about the same ratio the largest: no processor makes more of a smaller one."""
    largest: dict[int, tuple[int, int]] = {}
    for width, height in sorted(sizes):
        ratio = round(4 * math.log2(width / height))
        largest[ratio] = max(largest.get(ratio, (0, 0)), (width, height), key=math.prod)
    return list(largest.values())


def _of_one_size(architecture: PreTrainedConfig, count: int) -> PictureInputs:
    """The inputs of an architecture that reads every picture as one square. Raises AttributeError for one that says no side."""
    vision = architecture.vision_config
    side = vision.image_size
    return PictureInputs.of(
        {"pixel_values": torch.empty(count, getattr(vision, "num_channels", 3), side, side, device="meta")}
    )
