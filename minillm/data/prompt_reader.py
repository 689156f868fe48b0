"""Messages as a model reads them: rendered by the template, tokenised, with the pictures that they show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.config.data import InstructionKeys
from minillm.data.images import Picture, PictureReader, as_texts, shown_in
from minillm.data.records import Conversation
from minillm.data.sources import DataError, Place
from minillm.data.special_text import is_marked, special_tokens_of
from minillm.data.templates import Rendered, render, require_variables
from minillm.data.tokenization import continuation_ids, encode
from minillm.models.processors import placeholder_ids, processor_of


@dataclass(frozen=True)
class ReadPrompt:
    """One prompt as a model reads it, and the answer to it."""

    text: str
    ids: list[int]
    extras: Mapping[str, Tensor]  # of its pictures
    answer: str  # without what closes it; empty without an answer
    answer_ids: list[int]  # with what closes it, as long as max_response_length
    misplaced: str | None  # why nobody may be trained on the answer
    typed: bool  # special tokens are text in it


class PromptReader:
    """Puts messages to models: renders and tokenises them, with the pictures that they show.

    Args:
        now: what chat templates take for the time; default: the time, once for all prompts.

    Raises DataError for template_kwargs that the chat template does not read.
    """

    def __init__(self, config: InstructionKeys, tokenizer: PreTrainedTokenizerBase, now: datetime | None = None):
        self.config, self.tokenizer, self.now = config, tokenizer, now or datetime.now()
        require_variables(tokenizer, config.template_kwargs, "template_kwargs")
        self.special = special_tokens_of(tokenizer)
        processor = processor_of(tokenizer)
        self.placeholders = frozenset() if processor is None else placeholder_ids(processor)
        self.pictures = None if processor is None else PictureReader(processor, max_pixels=config.max_image_pixels)

    def read(
        self,
        said: Conversation,
        pictures: Sequence[Picture] = (),
        *,
        where: str = "this prompt",
        limited: bool = False,
        before: ReadPrompt | None = None,
    ) -> ReadPrompt | None:
        """Args:
            pictures: those that no part of a message names.
            before: the same messages, read with another answer: their pictures are not read again.
            limited: return None for a prompt that is over max_characters or max_prompt_length.

        Raises DataError for pictures that cannot be shown, to this model or at all, and for what the template would leave
        out.
        """
        folder = where.folder if isinstance(where, Place) else Path(".")
        messages, shown = shown_in(where, folder, said.messages, pictures)
        if not shown:
            messages = as_texts(messages, "")
        elif self.pictures is None:
            raise DataError(
                f"{where}: it shows {len(shown)} pictures, and the tokenizer belongs to a model of text alone; choose a model "
                "of images and text, or take the pictures out of the data"
            )
        require_variables(self.tokenizer, said.variables, f"{where}: chat_template_kwargs")
        rendered = render(
            messages,
            self.config,
            self.tokenizer,
            context=said.context,
            answer=said.answer,
            tools=said.tools,
            variables=said.variables,
            now=self.now,
            where=where,
        )
        text = self.special.plain(rendered.prompt)
        if limited and len(text) > self.config.max_characters:
            return None
        special = self.config.template != "chat"  # a rendered chat already holds its special tokens
        first = self.config.max_prompt_length if limited else None
        try:
            text_ids = ids = encode(self.tokenizer, rendered.prompt, special, first=first)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if limited and len(ids) > self.config.max_prompt_length:  # pictures only add to them
            return None
        extras: Mapping[str, Tensor] = {}
        if shown:
            if text != rendered.prompt:
                typed = ", ".join(dict.fromkeys(self.special.typed(rendered.prompt)))
                raise DataError(
                    f"{where}: its text spells {typed}, which beside pictures cannot be read as text; take that out"
                )
            if before is not None:
                ids, extras = before.ids, before.extras
            else:
                ids, extras = self.pictures.read(where, text, shown, special=special)
            if special and ids and ids[-1] == self.tokenizer.eos_token_id and text_ids[-1] != ids[-1]:
                ids = ids[:-1]  # as `encode` has it
        elif self.placeholders & set(ids):
            raise DataError(
                f"{where}: its text says what stands for a picture ({self._said(ids)}), and it shows none; take that out"
            )
        if limited and len(ids) > self.config.max_prompt_length:
            return None
        answer = self._answer(rendered, text_ids, special, where)
        typed = text != rendered.prompt or rendered.answer is not None and is_marked(rendered.answer.text)
        return ReadPrompt(text, ids, extras, *answer, typed)

    def _answer(
        self,
        rendered: Rendered,
        prompt_ids: list[int],  # of the text by itself: a picture is one token
        special: bool,
        where: str,
    ) -> tuple[str, list[int], str | None]:
        if rendered.answer is None:
            return "", [], None
        answer, first = rendered.answer, self.config.max_response_length
        cut = answer.text[: self.config.max_characters]
        try:
            ids = continuation_ids(self.tokenizer, rendered.prompt, prompt_ids, cut, special, first=first)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        self.check_answer(ids, where)
        end = self.tokenizer.eos_token_id if answer.end is None else answer.end
        return self.special.plain(cut), [*ids, end][:first], answer.misplaced

    def check_answer(self, ids: Sequence[int], where: str) -> None:
        """Raises DataError for an answer with what stands for a picture: none can be shown there."""
        if self.placeholders & set(ids):
            raise DataError(f"{where}: its answer says what stands for a picture ({self._said(ids)}); take that out")

    def _said(self, ids: Sequence[int]) -> str:
        return ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(self.placeholders & set(ids))))
