"""The interpreter of another Triton is left as it is, and tests under it run all the same."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from tests.interpreted import NEEDED, quicken  # noqa: E402  which imports triton


@pytest.mark.parametrize("missing", NEEDED)
def test_an_interpreter_without_what_is_replaced_stays_as_it_is(missing):
    class Executor:
        def __call__(self):
            return "run"

    parts = {"_patch_lang": len, "_LangPatchScope": object, "GridExecutor": Executor}
    call, there = Executor.__call__, {name: part for name, part in parts.items() if name != missing}
    interpreter = SimpleNamespace(**there)
    with pytest.warns(UserWarning, match=f"has no {missing}: it stays as it is"):
        assert not quicken(interpreter)
    assert vars(interpreter) == there and Executor.__call__ is call
    whole = SimpleNamespace(**parts)
    assert quicken(whole) and whole._patch_lang is not len and Executor()() == "run"
