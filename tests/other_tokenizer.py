"""A small tokenizer that is another one than the byte tokenizer, with a chat template of its own, and a pair of models with both."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minillm.data.instructions import Example
from minillm.data.other_reading import OtherReading
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.models.tokenizers import byte_tokenizer
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from tests.conftest import tiny_llama

TEXT = "the cat sat a dog ran off we saw it birds sing no rain fell she left it is late go on"
TEMPLATE = (
    "{% for one in messages %}[{{ one.role }}]{{ one.content }}{% if one.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def small_bpe(*, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of some words and all bytes: byte-level as GPT-2's, or with sentencepiece's spaces and byte fallback."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if metaspace:
        alphabet = sorted({*TEXT, "▁"} - {" "})
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    if metaspace:
        learned = json.loads(tokenizer.to_str())["model"]
        vocab = learned["vocab"] | {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
        merges = [tuple(pair) for pair in learned["merges"]]
        tokenizer.model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def small_unigram() -> PreTrainedTokenizerFast:
    """A unigram vocabulary as T5's is: it normalises (NFKC), and has <unk> for what it cannot write."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def paired_models(*, seed: int = 0) -> Models:
    """A student that reads bytes and a teacher with `small_bpe`, of other sizes."""
    tokenizer, other = byte_tokenizer(), small_bpe()
    student = tiny_llama(vocab_size=len(tokenizer), seed=seed)
    teacher = tiny_llama(vocab_size=len(other), hidden_size=48, seed=seed + 1).requires_grad_(False)
    eos = tokenizer.eos_token_id
    pair = TokenizerPair(tokenizer, other)
    device = torch.device("cpu")
    return Models(student, LocalTeacher(teacher), tokenizer, len(tokenizer), (eos,), eos, device, tokenizers=pair)


def paired_examples(texts: list[str], models: Models) -> list[Example]:
    """Prompts with these answers, in the ids of both."""
    ours, theirs = models.tokenizers.student, models.tokenizers.teacher
    found = []
    for index, text in enumerate(texts):
        prompt = f"say {index}:"
        reading = OtherReading(theirs(prompt).input_ids, [], prompt, True, theirs.eos_token_id)
        answer = reading.answered(theirs, text, ended=True)
        other = OtherReading(reading.ids, answer, prompt, True, theirs.eos_token_id)
        ids = [*ours(text).input_ids, ours.eos_token_id]
        found.append(Example(index, ours(prompt).input_ids, ids, prompt, (text,), other=other))
    return found
