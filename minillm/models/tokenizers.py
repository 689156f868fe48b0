"""Tokenizers: a model's own, another one by name, or the built-in byte tokenizer that needs no file."""

from pathlib import Path

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minillm.config.models import ModelConfig
from minillm.models.paths import resolve_path

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
    """The tokenizer that `config.tokenizer` names (`byte`, a folder, a hub name), or the one of the model's path."""
    if config.tokenizer == "byte":
        return byte_tokenizer()
    where = resolve_path(config.tokenizer or config.path, output_dir)
    options = {"trust_remote_code": config.trust_remote_code}
    if isinstance(where, Path) and where.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(where.parent, gguf_file=where.name, **options)
    if not isinstance(where, Path):
        options["revision"] = config.revision
    return AutoTokenizer.from_pretrained(where, **options)
