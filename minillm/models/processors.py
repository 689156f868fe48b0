"""The processor of a model of images and text: its image processor, and how a picture is spelled in ids."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from minillm import UserError

_ATTRIBUTE = "picture_processor"  # of a tokenizer that belongs to a processor
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_VIDEOS = "video_preprocessor_config.json"
# Of what a processor is made of and says nothing about what it does to a picture or how it spells it.
_NAMES = {"processor_class", "auto_map", "video_processor", "audio_tokenizer"}


def processor_of(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin | None:
    """The processor that a tokenizer belongs to, None for the tokenizer of a text model."""
    return getattr(tokenizer, _ATTRIBUTE, None)


def tokenizer_with(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, which remembers whose it is and has its chat template."""
    tokenizer = processor.tokenizer
    setattr(tokenizer, _ATTRIBUTE, processor)
    if not tokenizer.chat_template and processor.chat_template:
        tokenizer.chat_template = processor.chat_template
    return tokenizer


def load_processor(where: Path | str, **options: Any) -> ProcessorMixin | None:
    """The processor at a place, None where there is none for pictures and text.

    Videos are never shown here: where torchvision, which transformers reads them with, is not installed, the processor
    comes without that part and keeps its settings for the file. `options` are those of from_pretrained.
    """
    found = [_file(where, name, options) for name in PROCESSOR_FILES]
    if not any(found):
        return None
    try:
        processor = None if is_torchvision_available() else _without_videos(where, options)
        processor = processor or AutoProcessor.from_pretrained(where, **options)
    except ImportError as error:
        raise UserError(f"{where}: its processor needs what is not installed: {error}") from error
    parts = (getattr(processor, part, None) for part in ("tokenizer", "image_processor"))
    return processor if isinstance(processor, ProcessorMixin) and all(parts) else None


def load_image_processor(where: Path | str, **options: Any) -> BaseImageProcessor:
    """The part of a processor that prepares pictures, of a folder or from its own file. Raises UserError where there is none."""
    try:
        return AutoImageProcessor.from_pretrained(where, **options)
    except ImportError as error:
        raise UserError(f"{where}: its image processor needs what is not installed: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: no image processor is there ({str(error).splitlines()[0]})") from error


def placeholder_ids(processor: ProcessorMixin) -> frozenset[int]:
    """The ids that stand in a prompt for parts of a picture."""
    return frozenset(one for one in processor.image_token_ids if one is not None)


def same_pictures(ours: ProcessorMixin, theirs: ProcessorMixin) -> str | None:
    """The first setting in which two processors differ, so that a picture would reach one model as another one; None
    where they make the same of every picture."""
    settings = [_flat(processor.to_dict()) for processor in (ours, theirs)]
    for one, processor in zip(settings, (ours, theirs), strict=True):
        one["placeholder"] = sorted(placeholder_ids(processor))
    changed = sorted(key for key in {*settings[0], *settings[1]} if settings[0].get(key) != settings[1].get(key))
    if not changed:
        return None
    return f"{changed[0]} is {settings[0].get(changed[0])!r} for the student and {settings[1].get(changed[0])!r} for the teacher"


def unshared_pictures(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None) -> str | None:
    """The reason why a picture that the student sees would reach the teacher as another one, or not at all; None where
    there is no such reason, or no teacher.

    Args: the tokenizers of both. That of a text student has no pictures to share.
    """
    if teacher is None or processor_of(student) is None:
        return None
    if processor_of(teacher) is None:
        return "the teacher reads text alone; choose a teacher of images and text, or take the pictures out"
    different = same_pictures(processor_of(student), processor_of(teacher))
    if different is None:
        return None
    return (
        f"student and teacher prepare them differently ({different}); choose a student of the teacher's family, or prune "
        "the teacher (student.init=prune)"
    )


class UnreadVideos(VideoProcessorMixin):
    """A stand-in for the part of a processor that reads videos, which keeps that part's settings."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def __call__(self, videos, **options):
        raise UserError("videos cannot be shown, only pictures")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


def _without_videos(where: Path | str, options: dict[str, Any]) -> ProcessorMixin | None:
    """None for a processor that reads no videos."""
    settings, _ = ProcessorMixin.get_processor_dict(where, **options)
    name = settings.get("processor_class") or _read(where, PROCESSOR_FILES[1], options).get("processor_class")
    if name is None:
        name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(where, **options).model_type)
    kind = None if name is None else processor_class_from_name(name)
    if kind is None or "video_processor" not in kind.get_attributes():
        return None
    parts = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}
    arguments = [
        parts[part].from_pretrained(where, **options)
        if part in parts
        else UnreadVideos(settings.get(part) or _read(where, _VIDEOS, options))
        for part in kind.get_attributes()
        if part in parts or part == "video_processor"
    ]
    return without_videos(kind).from_args_and_dict(arguments, settings)


def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor's class that takes UnreadVideos for the part that reads videos, where nothing could read them."""

    def check(self, name: str, part: Any) -> type:
        return type(part) if isinstance(part, UnreadVideos) else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__module__": kind.__module__})


def _file(where: Path | str, name: str, options: dict[str, Any]) -> str | None:
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    return cached_file(where, name, revision=options.get("revision"), **quiet)


def _read(where: Path | str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    file = _file(where, name, options)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        if key not in _NAMES:
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
