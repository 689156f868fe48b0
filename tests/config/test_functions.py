"""Functions that a key names: found in modules and files, imported once, and refused with what to correct."""

import statistics
import sys

import pytest

from minillm import UserError
from minillm.config.functions import load_function

SOURCE = """
from dataclasses import dataclass
runs = open(__file__ + ".runs", "a").write("x")
limit = 3

@dataclass
class Found:  # which looks its module up by name
    value: "int"

def judge(prompt, answer):
    return Found(len(answer)).value

def by_name(*, prompt, answer):
    return 0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME_OF_REWARDS", str(tmp_path))
    return tmp_path


def test_a_function_of_a_module_or_of_a_file_is_found(folder):
    assert load_function("statistics:mean", "data") is statistics.mean
    found = [
        load_function(f"{place}rewards.py:judge", "p", "a") for place in ("", "./", f"{folder}/", "$HOME_OF_REWARDS/")
    ]
    assert found[0]("p", "answer") == 6 and len(set(found)) == 1
    assert (folder / "rewards.py.runs").read_text() == "x"  # whatever names it


def test_files_of_one_name_are_two_modules(folder):
    other = folder / "other" / "rewards.py"
    other.parent.mkdir()
    other.write_text("def judge(prompt, answer):\n    return 'other'\n")
    assert load_function("rewards.py:judge", "p", "a")("p", "a") == 1
    assert load_function("other/rewards.py:judge", "p", "a")("p", "a") == "other"


def test_a_function_in_c_has_no_signature_to_look_at():
    assert load_function("builtins:max", "a", "b") is max


@pytest.mark.parametrize(
    "text, message",
    [
        ("judge", "'judge' names no function; write package.module:function or file.py:function"),
        (":judge", "names no function"),
        ("rewards.py:", "names no function"),
        ("rewards.py:judge()", "names no function"),
        ("a/b:judge", "'a/b' is the name of no module; write package"),
        ("absent.py:judge", "there is no file .*absent.py; paths count from the current folder"),
        ("no_such_module:judge", "No module named 'no_such_module'; install it, or name a file"),
        ("rewards.py:jugde", r"jugde is not there in rewards.py \(did you mean judge\?\)"),
        ("rewards.py:limit", "limit is no function in rewards.py"),
        ("rewards.py:by_name", r"is called as by_name\(p, a\), which it does not accept: "),
        ("statistics:median", r"is called as median\(p, a\), which it does not accept: too many"),
    ],
)
def test_what_is_wrong_is_said(text, message, folder):
    with pytest.raises(UserError, match=message):
        load_function(text, "p", "a")


@pytest.mark.parametrize(
    "line, message", [("1 / 0", "ZeroDivisionError: division by zero"), ("exit(3)", "SystemExit: 3")]
)
def test_a_module_that_fails_is_said_and_forgotten(line, message, folder):
    (folder / "broken.py").write_text(line)
    before = set(sys.modules)
    with pytest.raises(UserError, match=f"broken.py fails when it is imported: {message}"):
        load_function("broken.py:judge")
    assert not [name for name in set(sys.modules) - before if name.startswith("broken")]
