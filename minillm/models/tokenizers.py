"""Tokenizers: a model's own, another one by name, or the built-in byte tokenizer that needs no file."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from minillm.config.models import ModelConfig
from minillm.models.families import text_config
from minillm.models.folders import check_folder
from minillm.models.locations import hub_arguments, reading
from minillm.models.processors import load_processor, processor_of, tokenizer_with

Message = dict[str, Any]  # role, and content: a text, or a list of parts of type text and image
EOS = "<|end|>"
BYTE_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte and one that ends a text: any text goes in and comes out, from no file at all."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.chat_template = BYTE_TEMPLATE
    return fast


def load_tokenizer(config: ModelConfig, output_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `config.tokenizer` names (`byte`, a folder, a hub name), or the one of the model's path.

    One without an end of text takes what its chat template closes an answer with, or what the model ends with. Where a
    processor for pictures lies beside it, minillm.models.processors.processor_of gives that.
    """
    if config.tokenizer == "byte":
        return byte_tokenizer()
    if config.tokenizer is not None:  # the revision is that of the model's path
        where, options = hub_arguments(config.tokenizer, output_dir)
    else:
        where, options = hub_arguments(config.path, output_dir, config.revision)
    with reading(config.tokenizer or config.path):
        if isinstance(where, Path) and "gguf_file" not in options:
            check_folder(where)
        options["trust_remote_code"] = config.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        processor = None if "gguf_file" in options else load_processor(where, **options)
        if processor is not None:
            tokenizer = tokenizer_with(processor)
    if tokenizer.eos_token_id is None:
        ends = [end_of_turn(tokenizer), *_ends_of_model(config, output_dir)]
        known = [end for end in ends if end is not None and end < len(tokenizer)]
        if known:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(known[0])
    return tokenizer


def _ends_of_model(config: ModelConfig, output_dir: Path) -> list[int | None]:
    """The ids at which the model stops, by its generation configuration or, without one, its architecture's."""
    if config.path is None:
        ends = (getattr(config, "config", None) or {}).get("eos_token_id")
    else:
        where, options = hub_arguments(config.path, output_dir, config.revision)
        with reading(config.path):
            try:
                ends = GenerationConfig.from_pretrained(where, **options).eos_token_id
            except OSError:  # there is none
                architecture = AutoConfig.from_pretrained(where, trust_remote_code=config.trust_remote_code, **options)
                ends = text_config(architecture).eos_token_id
    return ends if isinstance(ends, list) else [ends]


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options) -> str:
    """The text of a conversation. Raises jinja2.TemplateError where the template refuses it, or loses the last message.

    Templates of models of images and text want contents as lists of parts, and most others as texts.
    """
    if processor_of(tokenizer) is None:
        return _rendered(tokenizer, messages, **options)
    said = [text.strip() for text in message_texts(messages[-1])]
    for form in ([_in_parts(message) for message in messages], messages):
        text = _rendered(tokenizer, form, **options)
        if all(part in text for part in said):
            return text
    raise TemplateError("it leaves out what the last message says")


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options) -> str:
    """What a template makes of a conversation. Whatever its code meets, such as a range without end, is a TemplateError."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, MemoryError):
        raise
    except Exception as error:  # of Python's operators, which templates are made of
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def message_texts(message: Message) -> list[str]:
    """What a message says, without its pictures."""
    return [part["text"] for part in _in_parts(message)["content"] if part["type"] == "text"]


def _in_parts(message: Message) -> Message:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template closes an answer, often another than the tokenizer's EOS.

    None where there is no template, where it refuses a plain question and answer, or closes with no special token.
    """
    if not tokenizer.chat_template:
        return None
    answer = "0123456789"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = apply_chat_template(tokenizer, messages)
    except TemplateError:
        return None
    _, found, closing = text.rpartition(answer)
    if not found:
        return None
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return next((index for index in tokenizer(closing, add_special_tokens=False).input_ids if index in special), None)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends an answer: the tokenizer's EOS, the chat template's end of turn, the generation configuration's.

    Ids beyond the vocabulary (defaults of an architecture that was built smaller) are left out.
    """
    vocab_size = text_config(model.config).vocab_size
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    ids = [tokenizer.eos_token_id, end_of_turn(tokenizer), *listed]
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None and token < vocab_size))
