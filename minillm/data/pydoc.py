"""Questions about Python's own library, answered by its docstrings: real text on every machine, without a download."""

import hashlib
import importlib
import inspect
import io
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache

from minillm.data.sources import Place, Record

# Modules that do something when they are imported, belong to tests, or need a screen.
SKIPPED = {"antigravity", "this", "test", "idlelib", "lib2to3", "turtledemo", "turtle", "tkinter", "ensurepip"}
SUBMODULES = ("urllib.request", "urllib.parse", "os.path", "collections.abc", "concurrent.futures", "email.message",
              "http.client", "http.server", "importlib.metadata", "json.decoder", "logging.handlers",
              "multiprocessing.pool", "unittest.mock", "xml.etree.ElementTree")  # fmt: skip
QUESTIONS = ("What does `{name}` do in Python?", "Explain Python's `{name}`.", "What is `{name}` in Python for?")
WORDS = range(6, 61)  # of an answer
SIGNATURE = re.compile(r"^[\w.]+\(.*\)( ?-> ?.*)?$")


def pydoc_records(split: str) -> Iterator[Record]:
    """instruction/output records of one split; a tenth of the names, chosen by hash, is the test."""
    for name, answer in documented_names():
        digest = hashlib.sha256(name.encode()).digest()
        if (digest[0] % 10 == 0) == (split == "test"):
            question = QUESTIONS[digest[1] % len(QUESTIONS)].format(name=name)
            yield Place(f"documentation of {name}"), {"instruction": question, "output": answer}


def pydoc_documents() -> Iterator[str]:
    """The documentation of every name as a text of its own; the test split is left out."""
    for _, record in pydoc_records("train"):
        yield f"{record['instruction']}\n{record['output']}"


@cache
def documented_names() -> tuple[tuple[str, str], ...]:
    """(qualified name, first paragraph of its documentation), sorted by name, each text once."""
    answers: dict[str, str] = {}
    for module_name, module in _modules():
        for name, member in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isroutine(member) or inspect.isclass(member)):
                continue
            home = (getattr(member, "__module__", None) or module_name).split(".")[0].lstrip("_")
            if module_name != "builtins" and home != module_name.split(".")[0]:
                continue  # imported from elsewhere
            qualified = name if module_name == "builtins" else f"{module_name}.{name}"
            answers.setdefault(qualified, first_paragraph(member))
            if inspect.isclass(member):
                for attribute, value in sorted(vars(member).items()):
                    if not attribute.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                        answers.setdefault(f"{qualified}.{attribute}", first_paragraph(value))
    seen, unique = set(), []
    for name, answer in sorted(answers.items()):
        if answer and answer not in seen:
            seen.add(answer)
            unique.append((name, answer))
    return tuple(unique)


def first_paragraph(member: object) -> str:
    """The first paragraph of the member's own docstring after any signature line; "" where its length is unfit."""
    text = member.__dict__.get("__doc__") if isinstance(member, type) else getattr(member, "__doc__", None)
    if not isinstance(text, str):
        return ""
    lines = inspect.cleandoc(text).split("\n")
    while lines and (not lines[0].strip() or SIGNATURE.match(lines[0].strip())):
        lines = lines[1:]
    paragraph = " ".join("\n".join(lines).split("\n\n")[0].split())
    return paragraph if len(paragraph.split()) in WORDS else ""


def _modules() -> Iterator[tuple[str, object]]:
    names = [name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED]
    for name in sorted([*names, *SUBMODULES]):
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                yield name, importlib.import_module(name)
            except (ImportError, OSError):  # of another platform, or built without it
                continue
