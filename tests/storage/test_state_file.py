"""Whatever fails while a state file is read is told in one line that names the file and what to do."""

import json
from pathlib import Path

import pytest

from minillm import UserError
from minillm.storage.state_file import reading_state

PATH = Path("run/checkpoint-3/state/engine.pt")


@pytest.mark.parametrize(
    "error, reason",
    [
        (KeyError("optimizer"), "it has no 'optimizer'"),
        (FileNotFoundError(2, "No such file or directory", str(PATH)), "the file is missing"),
        (UserError("weight 3 is (2,), the weight (3,)"), "weight 3 is (2,), the weight (3,)"),
        (RuntimeError("\nfirst line\nand a stack trace"), "RuntimeError: first line"),
        (ValueError("x" * 1000), f"ValueError: {'x' * 200}"),
        (EOFError(), "EOFError"),
    ],
)
def test_an_error_of_any_kind_is_one_line_about_the_file(error, reason):
    with pytest.raises(UserError) as caught, reading_state(PATH):
        raise error
    told = f"{PATH}: {reason}. It is not what this run has written; remove checkpoint-3 to go on from the checkpoint"
    assert str(caught.value) == f"{told} before it"
    assert caught.value.__cause__ is error


def test_what_can_be_read_is_read_and_ctrl_c_stays_what_it_is(tmp_path):
    with reading_state(tmp_path):
        assert json.loads("3") == 3
    with pytest.raises(KeyboardInterrupt), reading_state(tmp_path):
        raise KeyboardInterrupt
