"""Tokenizers: a model's own, another one by name, or the built-in byte tokenizer that needs no file."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
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
from minillm.models.processors import load_processor, tokenizer_with

Message = dict[str, Any]  # role, and content: a text, or a list of parts of type text and image
EOS = "<|end|>"
BYTE_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


# The beginning of a template for messages whose content is none, which transformers takes away before it calls one.
_WITHOUT_CONTENT = (
    "{% set given = namespace(messages=[]) %}{% for message in messages %}{% set given.messages = given.messages + "
    "[message if message.content is defined else dict(message, content=none)] %}{% endfor %}"
    "{% set messages = given.messages %}"
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


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    now: datetime | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation, whatever the template leaves out of it. A content may be None.

    Args:
        now: what the template takes for the time (strftime_now); default: the time.
        tools: JSON schemas of functions.
        variables: of the template.

    Raises jinja2.TemplateError where the template refuses the messages, or its code fails, as on a range without end.
    """
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if now is not None and "strftime_now" in template:
            template = _at(now) + template
        if any(message["content"] is None for message in messages):
            template = _WITHOUT_CONTENT + template
        return tokenizer.apply_chat_template(messages, chat_template=template, tools=tools, tokenize=False, **variables)
    except (TemplateError, MemoryError):
        raise
    except Exception as error:  # of Python's operators, which templates are made of
        raise TemplateError(f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=8)
def _at(now: datetime) -> str:
    """The beginning of a template for which the time stands still."""
    text = "format"
    for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ":
        for directive in (f"%{letter}", f"%-{letter}"):
            text += f" | replace({directive!r}, {now.strftime(directive)!r})"
    return f"{{% macro strftime_now(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n"


def message_texts(message: Message) -> list[str]:
    """The texts of a message, without its pictures."""
    return [part["text"] for part in in_parts(message)["content"] if part["type"] == "text"]


def in_parts(message: Message) -> Message:
    """A message whose content is a list of parts."""
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
    found = closing = ""
    for form in (messages, [in_parts(message) for message in messages]):  # some leave out the one or the other
        try:
            _, found, closing = apply_chat_template(tokenizer, form).rpartition(answer)
        except TemplateError:
            continue
        if found:
            break
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
