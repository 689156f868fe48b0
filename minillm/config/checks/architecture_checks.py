"""Checks of architectures: models are causal language models, and that of `student.config` can be built.

An architecture is built as transformers builds it, on the meta device, which holds no weights. That imports torch and
transformers, so that it is done only where `student.config` is given.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from minillm import UserError
from minillm.config.checks.facts import Facts, Found, keys_at, read_config_json
from minillm.config.models import StudentConfig, teachers_of
from minillm.config.upcycle import UpcycleConfig
from minillm.config.wording import expected, show

# The names that families give to numbers of layers, heads, tokens and features.
SIZES = frozenset(
    "hidden_size n_embd d_model intermediate_size n_inner ffn_dim head_dim vocab_size num_hidden_layers n_layer n_layers "
    "num_layers num_attention_heads n_head n_heads num_key_value_heads max_position_embeddings n_positions".split()
)
LARGEST = 2**31 - 1
MOST_LAYERS = 200  # of which a model is built in a moment
# Ends of class names in `architectures` of models that predict no next token.
_OTHER_TASKS = (
    "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForImageClassification",
    "ForObjectDetection", "ForSemanticSegmentation", "ForCTC", "ForPreTraining",
)  # fmt: skip
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_KIND = ("student", "config", "model_type")
_WANTED = "student and teacher must be causal language models (llama, gpt2, qwen2, ...)"


def causal_models(facts: Facts) -> Iterator[Found]:
    """The models of local folders predict the next token from those before it."""
    models = {"student": facts.groups.get("student"), **teachers_of(facts.groups.get("teacher"))}
    paths = {f"{key}.path": getattr(model, "path", None) for key, model in models.items()}
    method = facts.groups.get("method")
    paths["method.reference"] = None if method is None else method.needs().reference
    for key, path in paths.items():
        if not path:
            continue
        keys = read_config_json(Path(path))
        names = keys.get("architectures")
        names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        kind = f"{names[0]}, " if names else ""
        if keys.get("is_encoder_decoder") is True:
            yield Found(key, f"{path} is {kind}an encoder-decoder; {_WANTED}")
        elif names and all(name.endswith(_OTHER_TASKS) for name in names):
            yield Found(key, f"{path} is {kind}which predicts no next token; {_WANTED}")


def fresh_architecture(facts: Facts, student: StudentConfig) -> Iterator[Found]:
    """The keys of `student.config` are an architecture that can be built."""
    keys = _all_keys(student)
    if keys is None:
        return
    wrong = [key for key in student.config if key in SIZES and not _is_size(student.config[key])]
    for key in wrong:
        message = f"must be from 1 to {LARGEST:,}, not {show(student.config[key])}"
        yield Found(("student", "config", key), message)
    if not wrong:
        yield from _wrong_keys(json.dumps(keys), json.dumps(student.config))


def sparse_form(facts: Facts, student: StudentConfig) -> Iterator[Found]:
    """A student that is to be upcycled has an architecture with experts that says all that its own one does."""
    keys = student.upcycle
    if keys is None:
        return
    if keys.num_experts_per_tok > keys.num_experts:
        message = f"of {keys.num_experts} experts no token can be sent to {keys.num_experts_per_tok}"
        yield Found("student.upcycle.num_experts_per_tok", message, ("student.upcycle.num_experts",))
        return
    dense = keys_at(facts, student.path or "")
    if not isinstance(dense.get("model_type"), str) or student.trust_remote_code:
        return
    problem = _upcycling_problem(json.dumps(dense), keys.model_dump_json())
    if problem is not None:
        key, message = problem
        yield Found(key, message, ("student.path", "student.init"))


@cache
def _upcycling_problem(dense: str, upcycle: str) -> tuple[str, str] | None:
    """The key and the message of what keeps a dense architecture from being upcycled, both by their keys as JSON; or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from minillm.config.sparse_architecture import upcycled_architecture

    keys = json.loads(dense)
    kind = keys.pop("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    family = CONFIG_MAPPING[kind]
    try:
        with _quiet():
            upcycled_architecture(family(**keys), UpcycleConfig.model_validate_json(upcycle))
    except UserError as error:
        key, _, message = str(error).partition(": ")
        return key.partition("=")[0], message
    except Exception:  # of keys that are wrong by themselves, which opening the model says
        return None
    return None


def _is_size(value: Any) -> bool:
    """True for a value that may be a size. Values of other types are left to transformers, which knows what it takes."""
    return not isinstance(value, int) or isinstance(value, bool) or 1 <= value <= LARGEST


def _all_keys(student: StudentConfig) -> dict[str, Any] | None:
    """The keys of the whole architecture, with those of a local `path`; None where they are not all known here."""
    if student.init != "random" or student.config is None or student.trust_remote_code:
        return None
    if student.path is None:
        return student.config if "model_type" in student.config else None
    keys = read_config_json(Path(student.path))
    if not isinstance(keys.get("model_type"), str):
        return None
    counts = {keys.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")} - {None}
    # lists of one entry per layer are made anew with another number of layers
    per_layer = [key for key, value in keys.items() if isinstance(value, list) and len(value) in counts]
    return _merged({key: value for key, value in keys.items() if key not in per_layer}, student.config)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Two architectures merged, where `over` wins. Groups such as text_config are merged key by key."""
    groups = {
        key: _merged(under[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(under.get(key), dict)
    }
    return {**under, **over, **groups}


@cache  # stages and arms of one file mostly have one architecture
def _wrong_keys(keys: str, own: str) -> tuple[Found, ...]:
    """The findings in an architecture. Both arguments are JSON: all of its keys, and those of student.config."""
    return tuple(_build(json.loads(keys), json.loads(own)))


def _build(keys: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Found]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = keys["model_type"]
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(kind), CONFIG_MAPPING, 1, 0.6)
        hint = f"did you mean {close[0]}?" if close else "llama, gpt2, qwen2, ..."
        yield Found(_KIND, f"transformers knows no {show(kind)} ({hint})")
        return
    family = CONFIG_MAPPING[kind]
    misspelt = list(_misspelt(own, family))
    if misspelt:
        yield from misspelt
        return
    try:
        with _quiet():
            architecture = family(**{key: value for key, value in keys.items() if key != "model_type"})
    except StrictDataclassError as error:
        yield _of_field(str(error), own) or Found("student.config", f"no {kind} model has these keys: {_cause(error)}")
        return
    except Exception as error:  # whatever a family's own code makes of a value that it did not expect
        yield Found("student.config", f"no {kind} model has these keys: {_cause(error)}")
        return
    refused = _not_causal(kind, architecture)
    if refused is not None:
        yield Found(_KIND, refused)
        return
    wrong = _heads_problem(architecture.get_text_config()) or _failure(architecture)
    if wrong is not None:
        yield Found("student.config", f"no {kind} model can be built of these keys: {wrong}")


def _heads_problem(architecture: Any) -> str | None:
    """The problem with groups of heads that share keys and values, which only a forward pass would find; or None."""
    heads, groups = (getattr(architecture, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        return f"the {heads} attention heads are no multiple of the {groups} key-value heads"
    return None


def _failure(architecture: Any) -> str | None:
    """The reason why no model of this architecture can be built; None where one can, or has too many layers to try."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if (architecture.get_text_config().num_hidden_layers or 0) > MOST_LAYERS:
        return None
    family = AutoModelForImageTextToText if _reads_images(architecture) else AutoModelForCausalLM
    try:
        with _quiet(), torch.device("meta"):
            family.from_config(architecture)
    except Exception as error:  # whatever a family's own code makes of its keys
        return _cause(error)
    return None


def _not_causal(kind: str, architecture: Any) -> str | None:
    """The message for a family that does not predict the next token from those before it, None for one that does."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if architecture.is_encoder_decoder:
        return f"{kind} is an encoder-decoder; {_WANTED}"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _reads_images(architecture):
        return f"{kind} predicts no next token; {_WANTED}"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(architecture, "is_decoder", False):
        return f"{kind} reads a text in both directions unless its is_decoder is true; {_WANTED}"
    return None


def _reads_images(architecture: Any) -> bool:
    """True for an architecture whose models take images beside text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    listed = architecture.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return listed and getattr(architecture, "vision_config", None) is not None


def _misspelt(own: Mapping[str, Any], family: type) -> Iterator[Found]:
    """Keys that the family nearly has: transformers keeps every key, and uses those that it knows."""
    known = {field.name for field in fields(family)} | set(family.attribute_map)
    for key in own:
        close = difflib.get_close_matches(key, known, 1, 0.85)
        if key not in known and close:
            message = f"{family.model_type} models have no such key (did you mean {close[0]}?)"
            yield Found(("student", "config", key), message)


def _of_field(text: str, own: Mapping[str, Any]) -> Found | None:
    """The finding of a value of another type than its family takes, None where the error is of another kind."""
    found = re.search(r"Field '(\w+)' expected (\w+)", text)
    if found is not None:
        types = [found[2]]
    else:
        found = re.search(r"Field '(\w+)' with value .* doesn't match any type in (.*?)\)", text)
        types = [] if found is None else re.findall(r"<class '(\w+)'>", found[2])
    if not types or found[1] not in own:
        return None
    words = " or ".join(_TYPES.get(name, name) for name in types if name != "NoneType")
    return Found(("student", "config", found[1]), expected(words, own[found[1]]))


def _cause(error: Exception) -> str:
    """The cause of an error in one line, without the name of the validator that transformers puts above it."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"^\w+Error: ", "", lines[-1].strip())
    return text if isinstance(error, ValueError | RuntimeError) or len(lines) > 1 else f"{type(error).__name__}: {text}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning about ids beyond a vocabulary: those of the tokenizer come later."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
