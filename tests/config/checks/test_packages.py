"""Packages are looked for, not imported."""

import sys

from minillm.config.checks.packages import is_installed, missing_packages


def test_what_pip_knows():
    assert is_installed("pydantic") and not is_installed("no-such-distribution")
    assert missing_packages("no-such-distribution", "pydantic", "nor-this") == ["no-such-distribution", "nor-this"]


def test_nothing_is_imported():
    loaded = set(sys.modules)
    is_installed("pip")
    assert "pip" not in set(sys.modules) - loaded
