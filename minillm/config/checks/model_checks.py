"""Checks of student and teacher: the keys of their `init`, layers that exist, and installed packages."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from minillm.config.checks.facts import Facts, Found, Idle, architecture_of
from minillm.config.checks.packages import is_installed, missing_packages
from minillm.config.lora import HEAD_REFUSED, HEADS, TABLE_REFUSED, TABLES, LoraConfig
from minillm.config.methods import Method
from minillm.config.models import (
    OF_INIT,
    ModelConfig,
    ServedTeacherConfig,
    StudentConfig,
    TeacherConfig,
    TeacherSide,
    teachers_of,
)
from minillm.config.paths import is_hub_name

# attn_implementation -> (distribution, how to get it)
_FLASH = {
    "flash_attention_2": (
        "flash-attn",
        "pip install flash-attn --no-build-isolation, which is minillm's extra `flash`",
    ),
    "flash_attention_3": ("flash-attn-3", "it is built from the folder hopper/ of the flash-attention sources"),
    "flash_attention_4": ("flash-attn-4", "pip install flash-attn-4"),
}

# A tokenizer in one of these files is read by sentencepiece, where no tokenizer.json lies beside it.
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def student_form(facts: Facts, student: StudentConfig) -> Iterator[Found]:
    """The keys of the student's `init` are there, and none of another `init`."""
    written = facts.data.get("student", {})
    for key, init in OF_INIT.items():
        # one that is inherited may stand beside another init
        together = "init" not in written or facts.together(f"student.{key}", "student.init")
        if written.get(key) is not None and student.init != init:
            kind = Found if together else Idle
            yield kind(f"student.{key}", f"has no effect without init: {init}", ("student.init",))
    if student.init == "prune" and student.layers is None:
        yield Found(
            "student.layers", "missing: which layers init: prune keeps, as a list, or how many", ("student.init",)
        )
    if student.path is not None:
        return
    if student.init != "random":
        message = f"missing: init: {student.init} takes the weights of a model"
        yield Found("student.path", message, ("student.init",))
        return
    if student.config is None:
        yield Found("student.config", "missing: the architecture of init: random, or a `path` to take it from")
    elif "model_type" not in student.config:
        yield Found("student.config", "without a `path` the architecture needs its model_type (llama, gpt2, ...)")
    if student.tokenizer is None:
        yield Found("student.tokenizer", "missing: a student without `path` has no tokenizer of its own; or say byte")


def pruned_layers(facts: Facts, student: StudentConfig) -> Iterator[Found]:
    """The layers to keep exist, and each is named once."""
    if student.layers is None:
        return
    there = architecture_of(facts, "student", pruned=False).layers
    if isinstance(student.layers, int):
        if there is not None and student.layers > there:
            yield Found("student.layers", f"{student.path} has only {there} layers", ("student.path",))
        return
    if not student.layers:
        yield Found("student.layers", "must not be empty")
    repeated = [str(layer) for layer, count in Counter(student.layers).items() if count > 1]
    if repeated:
        yield Found("student.layers", f"names {', '.join(repeated)} more than once")
    beyond = [str(layer) for layer in student.layers if there is not None and layer >= there]
    if beyond:
        message = f"{student.path} has the layers 0 to {there - 1}, no {', '.join(beyond)}"
        yield Found("student.layers", message, ("student.path",))


def trained_parts(facts: Facts, student: StudentConfig, method: Method) -> Iterator[Found]:
    """The parts of the student that are trained go together with the rest of the configuration."""
    parts = student.trained_parts
    if parts is None:
        return
    key = "student.train" if student.train is not None else "student.vision_from_layer"
    if student.lora is not None:
        yield Found(
            key, "adapters are trained in the place of all weights; leave one of the two out", ("student.lora",)
        )
    if student.vision_from_layer is not None and "vision" not in parts:
        yield Found("student.vision_from_layer", "has no effect: student.train leaves out vision", ("student.train",))
    if {"language", "feed_forward"} <= {*parts}:
        yield Found("student.train", "feed_forward is a part of language; leave one of the two out")
    if not student.trained_by_text and method.needs().corpus:
        message = "without language or feed_forward nothing is trained by plain text, which method {} learns from too"
        yield Found("student.train", message.format(method.name), ("method.name",))


def adapters(facts: Facts, student: StudentConfig) -> Iterator[Found]:
    """The adapters of the student can be trained."""
    if student.lora is not None:
        yield from _trainable(("student", "lora"), student.lora)


def own_adapters(facts: Facts, method: Method) -> Iterator[Found]:
    """The adapters that a method has among its keys can be trained."""
    for key, value in method:
        if isinstance(value, LoraConfig):
            yield from _trainable(("method", key), value)


def _trainable(place: tuple[str, ...], lora: LoraConfig) -> Iterator[Found]:
    """The package that trains adapters is installed, and they are not asked for where no loss would see them."""
    if not is_installed("peft"):
        yield Found(place, "needs peft, which is not installed: pip install -e '.[lora]' in minillm's folder")
    names = lora.target_modules
    for number, name in enumerate([] if isinstance(names, str) else names):
        last = name.rpartition(".")[2]
        refused = HEAD_REFUSED if last in HEADS else TABLE_REFUSED if last in TABLES else None
        if refused is not None:
            yield Found((*place, "target_modules", number), refused.format(name))


def installed(facts: Facts) -> Iterator[Found]:
    """The optional packages that the models' keys and files take are installed."""
    for who, model in _models(facts):
        if not isinstance(model, ModelConfig):  # none, or a teacher that is no model here
            continue
        distribution, how = _FLASH.get(model.attn_implementation, (None, ""))
        if distribution is not None and not is_installed(distribution):
            message = f"{model.attn_implementation} needs {distribution}, which is not installed: {how}"
            yield Found(f"{who}.attn_implementation", message)
        missing = missing_packages("gguf", "accelerate")
        if (model.path or "").endswith(".gguf") and missing:
            message = f"a .gguf file needs {' and '.join(missing)}: pip install -e '.[gguf]' in minillm's folder"
            yield Found(f"{who}.path", message)
        key = "path" if model.tokenizer is None else "tokenizer"
        folder = Path(getattr(model, key) or "")
        vocabulary = next((name for name in _SENTENCEPIECE if os.path.isfile(folder / name)), None)
        if (
            vocabulary is not None
            and not os.path.isfile(folder / "tokenizer.json")
            and not is_installed("sentencepiece")
        ):
            message = f"{folder / vocabulary} needs sentencepiece, which is not installed: pip install sentencepiece"
            yield Found(f"{who}.{key}", message)


def quantized(facts: Facts, teacher: TeacherSide | None) -> Iterator[Found]:
    """The packages that quantise a teacher are installed, and its weights are not quantised yet."""
    for who, one in teachers_of(teacher).items():
        if not isinstance(one, TeacherConfig) or one.quantization is None:
            continue
        missing = missing_packages("bitsandbytes", "accelerate")
        if missing:
            needed = " and ".join(missing)
            message = f"needs {needed}, not installed: pip install -e '.[quantization]' in minillm's folder"
            yield Found(f"{who}.quantization", message)
        if one.path.endswith(".gguf"):
            message = "a .gguf file is read into plain weights; quantise a folder or a hub name, or leave this out"
            yield Found(f"{who}.quantization", message, (f"{who}.path",))


def servers(facts: Facts, teacher: TeacherSide | None) -> Iterator[Found]:
    """The addresses of a served teacher are addresses, each named once, and its keys go together."""
    for who, one in teachers_of(teacher).items():
        if not isinstance(one, ServedTeacherConfig):
            continue
        if not one.urls:
            yield Found(f"{who}.url", "must not be empty")
        for url in one.urls:
            problem = _url_problem(url, path=one.protocol == "openai")
            if problem is not None:
                yield Found(f"{who}.url", f"{url!r} {problem}; expected http://HOST:PORT or https://HOST:PORT")
        repeated = [url for url, count in Counter(one.urls).items() if count > 1]
        if repeated:
            yield Found(f"{who}.url", f"names {', '.join(repeated)} more than once")
        if one.protocol == "openai":
            if one.rows == "hidden":
                message = "servers of protocol openai send no hidden states; leave this out, or write top_k"
                yield Found(f"{who}.rows", message, (f"{who}.protocol",))
            if one.tokenizer is None and one.model is None:
                message = (
                    "missing: servers of protocol openai send no tokenizer; name a folder or a hub name that has the "
                    f"model's, here or in {who}.model"
                )
                yield Found(f"{who}.tokenizer", message, (f"{who}.protocol",))
        elif one.tokenizer is not None:
            message = "servers of protocol minillm send theirs; leave this out, or say protocol: openai"
            yield Found(f"{who}.tokenizer", message, (f"{who}.protocol",))
        if one.rows == "hidden":
            yield Idle(f"{who}.k", "has no effect on rows: hidden; it is for top_k", (f"{who}.rows",))


def _url_problem(url: str, *, path: bool) -> str | None:
    """The reason for which a text is no address of a server, which may have a `path`; None where it is one."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is no address ({error})"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "is no address of a server"
    if parts.username or parts.password:
        return "holds a password, which would be written into the run's files; name a variable in teacher.token_env"
    if parts.path and not path or parts.query or parts.fragment:
        return "has more than a host and a port"
    return "names port 0" if port == 0 else None


def _models(facts: Facts) -> Iterator[tuple[str, object]]:
    """(dotted key, keys) of the student and of every teacher, as far as they are there."""
    yield "student", facts.groups.get("student")
    yield from teachers_of(facts.groups.get("teacher")).items()


def revisions(facts: Facts) -> Iterator[Found]:
    """A revision stands beside a hub name."""
    for who, model in _models(facts):
        if isinstance(model, ModelConfig) and not is_hub_name(model.path or ""):
            yield Idle(f"{who}.revision", "has no effect: it is for hub names, and path is none", (f"{who}.path",))
