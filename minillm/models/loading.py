"""Teacher and student from a folder, a hub name, a GGUF file, an earlier stage, or fresh weights."""

import copy
from functools import partial
from pathlib import Path
from weakref import WeakSet

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from minillm import UserError
from minillm.config.models import ModelConfig, StudentConfig, TeacherConfig
from minillm.config.paths import expand, is_hub_name
from minillm.models.adapters import add_adapters
from minillm.models.attention import with_attention
from minillm.models.families import auto_class, opens_pictures
from minillm.models.folders import check_folder, check_size, require_all_weights
from minillm.models.loaded_embeddings import embeddings_kept
from minillm.models.locations import hub_arguments, reading
from minillm.models.parts import train_parts
from minillm.models.processors import placeholder_ids, processor_of
from minillm.models.pruning import layer_count, layer_lists, prune_layers
from minillm.models.quantization import check_quantized, quantization_options
from minillm.models.tokenizers import load_tokenizer
from minillm.models.upcycling import upcycle

_hollow_models: WeakSet[nn.Module] = WeakSet()


def load_teacher(
    config: TeacherConfig, *, output_dir: Path, device: torch.device, hollow: bool = False
) -> PreTrainedModel:
    """The frozen model: evaluation mode, no gradients. `hollow`: see is_hollow; not for one that is quantised.

    Raises UserError where it cannot be quantised as `config` says.
    """
    if config.quantization is None:
        model = _load(config, output_dir, hollow).to(device)
    else:  # layer by layer on its way to the device
        options = quantization_options(config.quantization, getattr(torch, config.dtype), device)
        model = _load(config, output_dir, **options)
        check_quantized(model)
        # on a CPU the plain ones lie in the mapped file, among all that were whole
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def load_student(
    config: StudentConfig,
    *,
    output_dir: Path,
    device: torch.device,
    seed: int,
    source: PreTrainedModel | None = None,
    saved: Path | None = None,
    hollow: bool = False,
) -> PreTrainedModel:
    """The model to train, without dropout: sampling and training must see the same distribution.

    With `config.train` the other parts of a model of images and text are frozen. With `config.lora` its weights are frozen, and it has new adapters that train in their place.

    `source` is an already loaded model of the same path; it is copied instead of being read again. `saved` is a folder
    with the very weights, whatever `path` and `init` made them from. `hollow`: see is_hollow.
    """
    start = config if saved is None else config.saved_in(saved)
    if start.init == "random":
        model = _fresh(start, output_dir, seed, hollow)
    elif source is not None:
        model = copy.deepcopy(source).to(getattr(torch, config.dtype))
        model = with_attention(partial(_attending, model), config.attn_implementation)
    else:
        model = _load(start, output_dir, hollow)
    if start.init == "prune":
        model = prune_layers(model, config.layers, hollow=hollow)
    elif start.init == "upcycle":
        model = upcycle(model, config.upcycle, seed=seed, hollow=hollow)
        if hollow:
            _hollow_models.add(model)
    model = without_dropout(model).to(device).requires_grad_(True)
    if config.trained_parts is not None:
        train_parts(model, config.trained_parts, vision_from_layer=config.vision_from_layer)
    if config.lora is None:
        return model
    path = "" if config.path is None else expand(config.path)
    published = config.init == "pretrained" and is_hub_name(path)
    where = {"base": path, "revision": config.revision} if published else {}
    return add_adapters(model, config.lora, seed=seed, **where)


def is_hollow(model: PreTrainedModel) -> bool:
    """True where the weights hold nothing yet: they will come from rank 0, one at a time, when the model is sharded over
    the ranks. Memory that is allocated and never written takes no room, so that a host holds a large model once."""
    return model in _hollow_models


def filled(model: nn.Module) -> None:
    """Say that a hollow model has its weights now."""
    _hollow_models.discard(model)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Zero every dropout, of modules and of the configuration's numbers that attention reads at run time."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    for config in configs.values():
        for name, value in config.to_dict().items():
            if ("dropout" in name or name.endswith(("pdrop", "layerdrop"))) and isinstance(value, float):
                setattr(config, name, 0.0)
    return model


def _attending(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    model.set_attn_implementation(attention)
    return model


def _load(config: ModelConfig, output_dir: Path, hollow: bool = False, **quantization) -> PreTrainedModel:
    with reading(config.path):
        return _read(config, output_dir, hollow, quantization)


def _read(config: ModelConfig, output_dir: Path, hollow: bool, quantization: dict) -> PreTrainedModel:
    where, place = hub_arguments(config.path, output_dir, config.revision)
    options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    if "gguf_file" in place:  # small on disk, and what it holds is only known once it is read
        make = partial(_from_gguf, config.path, where, {**place, **options})
        return with_attention(make, config.attn_implementation)
    if isinstance(where, Path):
        check_folder(where)
    architecture = AutoConfig.from_pretrained(where, **place, trust_remote_code=config.trust_remote_code)
    if getattr(architecture, "quantization_config", None) is not None:
        raise UserError(
            f"{config.path}: its weights are quantised already (quantization_config in its config.json). Give the model with "
            "whole weights; teacher.quantization makes a teacher's small as it is read"
        )
    if isinstance(where, Path):
        check_size(where, architecture, trust_remote_code=config.trust_remote_code)
    if not hollow:

        def make(attention: str) -> PreTrainedModel:
            with embeddings_kept():
                opened, found = auto_class(architecture).from_pretrained(
                    where, attn_implementation=attention, **place, **options, **quantization,
                    output_loading_info=True, ignore_mismatched_sizes=True,
                )  # fmt: skip
            require_all_weights(config.path, opened, found)
            return opened

        return with_attention(make, config.attn_implementation)
    model = _hollow(architecture, config.attn_implementation, **options).eval()
    try:
        model.generation_config = GenerationConfig.from_pretrained(where, **place)
    except OSError:  # as from_pretrained: then the one of the architecture
        pass
    return model


def _hollow(architecture: PreTrainedConfig, attention: str, **options) -> PreTrainedModel:
    with no_init_weights():
        model = with_attention(partial(_from_config, architecture, **options), attention)
    model.tie_weights()
    _hollow_models.add(model)
    return model


def _from_config(architecture: PreTrainedConfig, attention: str, **options) -> PreTrainedModel:
    return auto_class(architecture).from_config(architecture, attn_implementation=attention, **options)


def _from_gguf(path: str, folder: Path, options: dict, attention: str) -> PreTrainedModel:
    """A plain model of the dequantised weights: what transformers returns still calls itself quantised and refuses to
    be saved."""
    options = {**options, "attn_implementation": attention}
    loaded, found = AutoModelForCausalLM.from_pretrained(folder, **options, output_loading_info=True)
    require_all_weights(path, loaded, found)
    config = copy.deepcopy(loaded.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=options["dtype"], attn_implementation=attention)
    plain = plain.to_empty(device="cpu")
    plain.load_state_dict(loaded.state_dict())
    # buffers that no state dict carries (rotary frequencies) come from the loaded model
    buffers = dict(loaded.named_buffers())
    for name, buffer in plain.named_buffers():
        buffer.copy_(buffers[name])
    embeddings = loaded.get_input_embeddings().weight
    config.tie_word_embeddings = embeddings.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    plain.config.tie_word_embeddings = config.tie_word_embeddings
    if config.tie_word_embeddings:
        plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain


def _fresh(config: StudentConfig, output_dir: Path, seed: int, hollow: bool) -> PreTrainedModel:
    """Random weights keyed by `seed`, of the architecture at `path` or of `config` alone.

    Vocabulary, EOS, padding and what stands for a picture are the tokenizer's unless `config` says them; with a `path`
    and no tokenizer of its own they stay as they are there.
    """
    keys = dict(config.config or {})
    if config.path is not None:
        where, place = hub_arguments(config.path, output_dir, config.revision)
        with reading(config.path):
            if isinstance(where, Path) and where.is_dir():
                check_folder(where)
            architecture = AutoConfig.from_pretrained(where, trust_remote_code=config.trust_remote_code, **place)
    elif "model_type" in keys:
        try:
            architecture = AutoConfig.for_model(**keys)
        except ValueError:
            raise UserError(
                f"student.config.model_type: transformers knows no {keys['model_type']!r} (llama, gpt2, qwen2, ...)"
            ) from None
    else:
        raise UserError("student.config needs a model_type (llama, gpt2, qwen2, ...) where student.path is not given")
    if config.path is None or config.tokenizer is not None:
        keys = tokenizer_keys(architecture, load_tokenizer(config, output_dir), keys)
    architecture = changed_architecture(architecture, keys)
    dtype = getattr(torch, config.dtype)
    if hollow:
        return _hollow(architecture, config.attn_implementation, dtype=dtype)

    def make(attention: str) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _from_config(architecture, attention, dtype=dtype)

    return with_attention(make, config.attn_implementation)


def tokenizer_keys(architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, keys: dict) -> dict:
    """`keys` and, where they do not say it, what the tokenizer says of the architecture."""
    said = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not opens_pictures(architecture):
        return {**said, **keys}
    processor = processor_of(tokenizer)
    if processor is None:
        raise UserError(
            f"student: a {architecture.model_type} reads pictures, and its tokenizer has no processor for them; name a "
            "student.tokenizer whose folder has one (processor_config.json)"
        )
    said = {"text_config": {**said, **keys.get("text_config", {})}}
    return {"image_token_id": min(placeholder_ids(processor)), **keys, **said}


def changed_architecture(architecture: PreTrainedConfig, keys: dict) -> PreTrainedConfig:
    """The architecture with other values; with another number of layers its lists of an entry a layer are made anew.

    A group of values, such as text_config, changes those of its part of the architecture.
    """
    for name, part in keys.items():
        inner = getattr(architecture, name, None)
        if isinstance(part, dict) and isinstance(inner, PreTrainedConfig):
            setattr(architecture, name, changed_architecture(inner, part))
    keys = {
        name: value
        for name, value in keys.items()
        if not isinstance(getattr(architecture, name, None), PreTrainedConfig)
    }
    count, lists = layer_count(architecture), layer_lists(architecture)
    architecture.update(keys)
    if layer_count(architecture) == count:
        return architecture
    kept = {key: value for key, value in architecture.to_dict().items() if key not in lists or key in keys}
    return type(architecture).from_dict(kept)
