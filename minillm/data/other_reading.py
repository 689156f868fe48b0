"""A prompt as it is read by a teacher with another tokenizer: by its own chat template, in its own ids."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from minillm.data.images import Picture
from minillm.data.prompt_reader import PromptReader
from minillm.data.records import Conversation
from minillm.data.sources import DataError
from minillm.data.special_text import special_tokens_of
from minillm.data.tokenization import continuation_ids, encode


@dataclass(frozen=True)
class OtherReading:
    """One prompt in the ids of another tokenizer, and the first reference to it."""

    ids: list[int]
    answer_ids: list[int]  # with what closes it, cut at max_response_length; empty without a reference
    text: str
    special: bool  # the tokenizer adds its special tokens to the text
    end: int  # closes an answer
    misplaced: str | None = None  # why nobody may learn from what is said of the reference

    def answered(self, tokenizer: PreTrainedTokenizerBase, text: str, *, ended: bool) -> list[int]:
        """The ids of another answer to the prompt, with what closes it where it has `ended`."""
        text = special_tokens_of(tokenizer).mark(text)  # whoever wrote it, it is text
        ids = continuation_ids(tokenizer, self.text, self.ids, text, self.special)
        return [*ids, self.end] if ended else ids


def read_otherwise(
    reader: PromptReader, said: Conversation, pictures: Sequence[Picture], where: str
) -> OtherReading | None:
    """The messages of a record as `reader`, which has the other tokenizer, puts them; None for a prompt that is too long.

    Raises DataError for a prompt that shows pictures, and whatever reading raises.
    """
    require_no_pictures(said, pictures, where)
    read = reader.read(said, where=f"{where}, as the teacher reads it", limited=True)
    if read is None:
        return None
    chat = reader.config.template == "chat"
    end = reader.special.end_of_turn if chat else None
    end = reader.tokenizer.eos_token_id if end is None else end
    return OtherReading(read.ids, read.answer_ids, read.text, not chat, end, read.misplaced)


def require_no_pictures(said: Conversation, pictures: Sequence[Picture], where: str) -> None:
    """Raises DataError for a prompt that shows pictures."""
    parts = [part for message in said.messages if isinstance(message["content"], list) for part in message["content"]]
    if pictures or any(part["type"] != "text" for part in parts):
        raise DataError(
            f"{where}: it shows pictures, which are not read by a teacher with another tokenizer; take them out of the data"
        )


def read_plain_otherwise(
    tokenizer: PreTrainedTokenizerBase, prompt: str, reference: str, *, ended: bool, most: int
) -> OtherReading:
    """A text, cut into a prompt and its continuation, in the ids of another tokenizer: `most` of them of the latter."""
    ids, end = encode(tokenizer, prompt, True), tokenizer.eos_token_id
    reading = OtherReading(ids, [], prompt, True, end)
    answer = reading.answered(tokenizer, reference, ended=ended)[:most]
    return OtherReading(ids, answer, prompt, True, end)
