"""How an instruction is put to a model."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from minillm.config.analysis_keys import LabelKeys
from minillm.config.data import InstructionKeys
from minillm.data.images import as_texts
from minillm.data.sources import DataError
from minillm.models.processors import processor_of
from minillm.models.tokenizers import Message, apply_chat_template

_PREAMBLE = (
    "Below is an instruction that describes a task{extra}. Write a response that appropriately completes the request."
)


def alpaca(instruction: str, context: str) -> str:
    """The format of the MiniLLM paper's data."""
    if context:
        head = _PREAMBLE.format(extra=", paired with an input that provides further context")
        return f"{head}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
    return f"{_PREAMBLE.format(extra='')}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def render(
    messages: list[Message],
    config: InstructionKeys | LabelKeys,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: str = "",
    where: str = "this prompt",
) -> str:
    """The prompt's text: the messages before the answer in the configured template.

    Contents that are lists of parts show pictures: a chat template says where they stand, elsewhere the token of the
    tokenizer's processor does.

    Raises DataError where the template is `chat` and the tokenizer has none, or has one that refuses the messages:
    some know no system role, others only turns that alternate. `where` says whose messages they are.
    """
    if config.template == "chat":
        if not tokenizer.chat_template:
            raise DataError(
                "template: chat needs a tokenizer with a chat template, and this one has none; use template: alpaca or none"
            )
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        if context:
            messages = [*messages[:-1], _followed_by(messages[-1], f"\n\n{context}")]
        try:
            return apply_chat_template(tokenizer, [*system, *messages], add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in [*system, *messages])
            raise DataError(f"{where}: the tokenizer's chat template refuses the roles {roles}: {error}") from None
    processor = processor_of(tokenizer)
    texts = as_texts(messages, "" if processor is None else processor.image_token)
    text = "\n\n".join(message["content"] for message in texts)
    if config.template == "alpaca":
        return alpaca(text, context)
    return f"{text}\n\n{context}" if context else text


def _followed_by(message: Message, text: str) -> Message:
    content = message["content"]
    return {
        **message,
        "content": content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}],
    }
