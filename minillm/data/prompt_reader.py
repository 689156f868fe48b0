"""Messages as a model reads them: rendered by the template, tokenised, with the pictures that they show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.config.data import InstructionKeys
from minillm.data.images import Picture, PictureReader, as_texts, shown_in
from minillm.data.sources import DataError, Place
from minillm.data.templates import render
from minillm.data.tokenization import encode
from minillm.models.processors import placeholder_ids, processor_of
from minillm.models.tokenizers import Message


@dataclass(frozen=True)
class ReadPrompt:
    """One prompt as a model reads it."""

    text: str
    ids: list[int]
    text_ids: list[int]  # of the text by itself: a picture is one token
    extras: Mapping[str, Tensor]  # of its pictures


class PromptReader:
    """Puts messages to models: renders and tokenises them, with the pictures that they show."""

    def __init__(self, config: InstructionKeys, tokenizer: PreTrainedTokenizerBase):
        self.config, self.tokenizer = config, tokenizer
        processor = processor_of(tokenizer)
        self.placeholders = frozenset() if processor is None else placeholder_ids(processor)
        self.pictures = None if processor is None else PictureReader(processor, max_pixels=config.max_image_pixels)

    def read(
        self,
        messages: list[Message],
        pictures: Sequence[Picture] = (),
        *,
        context: str = "",
        where: str = "this prompt",
        limited: bool = False,
    ) -> ReadPrompt | None:
        """Args:
            pictures: those that no part of a message names.
            limited: return None for a prompt that is over max_characters or max_prompt_length.

        Raises DataError for pictures that cannot be shown, to this model or at all.
        """
        folder = where.folder if isinstance(where, Place) else Path(".")
        messages, shown = shown_in(where, folder, messages, pictures)
        if not shown:
            messages = as_texts(messages, "")
        elif self.pictures is None:
            raise DataError(
                f"{where}: it shows {len(shown)} pictures, and the tokenizer belongs to a model of text alone; choose a model "
                "of images and text, or take the pictures out of the data"
            )
        text = render(messages, self.config, self.tokenizer, context=context, where=where)
        if limited and len(text) > self.config.max_characters:
            return None
        special = self.config.template != "chat"
        text_ids = ids = encode(self.tokenizer, text, special, first=self.config.max_prompt_length if limited else None)
        if limited and len(ids) > self.config.max_prompt_length:  # pictures only add to them
            return None
        extras: Mapping[str, Tensor] = {}
        if shown:
            ids, extras = self.pictures.read(where, text, shown, special=special)
            if special and ids and ids[-1] == self.tokenizer.eos_token_id and text_ids[-1] != ids[-1]:
                ids = ids[:-1]  # as `encode` has it
        elif self.placeholders & set(ids):
            raise DataError(
                f"{where}: its text says what stands for a picture ({self._said(ids)}), and it shows none; take that out"
            )
        if limited and len(ids) > self.config.max_prompt_length:
            return None
        return ReadPrompt(text, ids, text_ids, extras)

    def check_answer(self, ids: Sequence[int], where: str) -> None:
        """Raises DataError for an answer with what stands for a picture: none can be shown there."""
        if self.placeholders & set(ids):
            raise DataError(f"{where}: its answer says what stands for a picture ({self._said(ids)}); take that out")

    def _said(self, ids: Sequence[int]) -> str:
        return ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(self.placeholders & set(ids))))
