"""YAML with line numbers, duplicate keys, numbers as people write them, and merging."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minillm.config.loader.document import COMMAND_LINE, Origin, dotted, dump, merge, read_file, read_override, wrap
from minillm.config.loader.validation import STAGE


def read(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    problems = []
    return read_file(path, problems), problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5.0e-6", 5e-6),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-2", -2),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", "010"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ('"8"', "8"),
        ("[1, 1e-4, a]", [1, 1e-4, "a"]),
    ],
)
def test_values_in_files_and_overrides(tmp_path, text, value):
    node, problems = read(tmp_path, f"key: {text}\n")
    assert not problems
    assert node.plain() == {"key": value}
    assert type(node.plain()["key"]) is type(value)
    override = read_override(f"a.key={text}", problems)
    assert not problems
    assert override.plain() == {"a": {"key": value}}
    assert type(override.plain()["a"]["key"]) is type(value)


def test_lines_are_those_of_the_keys(tmp_path):
    node, _ = read(tmp_path, "a: 1\n\n# words\nb:\n  c:\n    - x\n    - y: 2\n")
    assert node.closest(("b",))[0].origin.line == 4
    assert node.closest(("b", "c"))[0].origin.line == 5
    assert node.closest(("b", "c", 1, "y"))[0].origin.line == 7
    assert node.closest(("b", "nothing", "here")) == (node.value["b"], 1)


def test_a_key_that_stands_twice_is_an_error_at_every_level(tmp_path):
    node, problems = read(tmp_path, "a: 1\nb: {c: 1, c: 2}\na: 2\n")
    assert [(problem.line, problem.path) for problem in problems] == [(2, "b.c"), (3, "a")]
    assert "line 1" in problems[1].message
    assert node.plain() == {"a": 1, "b": {"c": 1}}


def test_anchors_and_merge_keys(tmp_path):
    node, problems = read(tmp_path, "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n")
    assert not problems
    assert node.plain()["more"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1\n", 2, "not valid YAML"),
        ("a:\n\tb: 1\n", 2, "tabs"),
        ("a: b: c\n", 1, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("- a\n", None, "keys and values"),
        ("x: 1\na: !!python/object/apply:os.getcwd []\n", 2, "!!python/object/apply:os.getcwd"),
        ("a: !thing 3\n", 1, "!thing"),
        ("a: !!int three\n", 1, "three"),
        ("a: !!bool three\n", 1, "three"),
        ("a: &a {b: *a}\n", 1, "contains itself"),
        ("a: &a {<<: &b {<<: *a}}\n", 1, "takes a group"),
        ("? [1, 2]\n: 3\n", 1, "plain text"),
    ],
)
def test_what_is_no_configuration_says_where_and_why(tmp_path, text, line, words):
    _, problems = read(tmp_path, text)
    assert problems[0].line == line
    assert words in problems[0].message
    assert "\n" not in str(problems[0])


def test_files_that_cannot_be_read(tmp_path):
    problems = []
    assert read_file(tmp_path / "none.yaml", problems) is None
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert read_file(tmp_path / "binary.yaml", problems) is None
    assert read_file(tmp_path, problems) is None
    assert ["no such file" in problems[0].message, len(problems)] == [True, 3]
    node, problems = read(tmp_path, "# nothing yet\n")
    assert (node.plain(), problems) == ({}, [])


@pytest.mark.parametrize("text", ["train", "=3", "train..x=1", ".a=1", "a.=2"])
def test_what_is_no_override(text):
    problems = []
    assert read_override(text, problems) is None
    assert problems[0].file == COMMAND_LINE
    assert repr(text) in problems[0].message


def test_an_override_that_is_not_yaml_is_text_unless_it_began_as_a_list():
    assert read_override("data.path=*.jsonl", []).plain() == {"data": {"path": "*.jsonl"}}
    assert read_override("a={b: 1}", []).plain() == {"a": {"b": 1}}
    problems = []
    assert read_override("a=[1, 2", problems) is None
    assert problems[0].path == "a"


def merged(under, over):
    return merge(wrap(under, Origin("under")), wrap(over, Origin("over")), STAGE).plain()


def test_groups_merge_key_by_key_and_lists_are_replaced():
    under = {"train": {"max_steps": 3, "bf16": True}, "eval": {"seeds": [1, 2]}}
    over = {"train": {"max_steps": 4}, "eval": {"seeds": [3]}, "seed": 1}
    expected = {"train": {"max_steps": 4, "bf16": True}, "eval": {"seeds": [3]}, "seed": 1}
    assert merged(under, over) == expected


def test_a_changed_discriminator_replaces_its_group():
    under = {"method": {"name": "minillm", "alpha": 0.5}, "data": {"prompts": {"type": "parquet", "path": "x"}}}
    assert merged(under, {"method": {"name": "kd"}})["method"] == {"name": "kd"}
    assert merged(under, {"method": {"name": "minillm", "gamma": 0.9}})["method"]["alpha"] == 0.5
    assert merged(under, {"method": {"gamma": 0.9}})["method"]["name"] == "minillm"
    assert merged(under, {"data": {"prompts": {"type": "pydoc"}}})["data"]["prompts"] == {"type": "pydoc"}
    # a group that does not say its type has the default one
    default = {"data": {"prompts": {"path": "x", "limit": 3}}}
    assert merged(default, {"data": {"prompts": {"type": "pydoc"}}})["data"]["prompts"] == {"type": "pydoc"}
    assert merged(default, {"data": {"prompts": {"type": "jsonl"}}})["data"]["prompts"]["limit"] == 3


def test_a_name_that_is_no_discriminator_is_a_key_like_any_other():
    under = {"data": {"prompts": {"type": "hf", "path": "org/set", "name": "first"}}}
    over = {"data": {"prompts": {"name": "second"}}}
    assert merged(under, over)["data"]["prompts"] == {"type": "hf", "path": "org/set", "name": "second"}


def test_merging_inside_freely_named_sets():
    under = {"eval": {"sets": {"a": {"path": "x", "limit": 2}, "b": {"type": "pydoc", "split": "test"}}}}
    over = {"eval": {"sets": {"a": {"limit": 3}, "b": {"path": "y", "type": "text"}}}}
    expected = {"a": {"path": "x", "limit": 3}, "b": {"path": "y", "type": "text"}}
    assert merged(under, over)["eval"]["sets"] == expected


def test_null_takes_a_group_or_an_entry_of_one_away():
    under = {"eval": {"steps": 5, "sets": {"a": {"path": "x"}, "b": {"path": "y"}}}, "train": {"warmup_steps": 3}}
    assert merged(under, {"eval": {"sets": {"a": None}}})["eval"]["sets"] == {"b": {"path": "y"}}
    assert merged(under, {"eval": {"sets": None}})["eval"] == {"steps": 5}
    assert merged(under, {"eval": None}) == {"train": {"warmup_steps": 3}}
    assert merged(under, {"eval": {"steps": None}})["eval"]["steps"] is None  # a value, which null replaces


def test_merged_values_remember_where_they_were_written():
    tree = merge(
        wrap({"train": {"a": 1, "b": 2}}, Origin("under", 3)), wrap({"train": {"b": 4}}, Origin("over", 9)), STAGE
    )
    assert tree.closest(("train", "a"))[0].origin == Origin("under", 3, ("train", "a"))
    assert tree.closest(("train", "b"))[0].origin == Origin("over", 9, ("train", "b"))


def test_dotted():
    assert dotted(("student", "layers", 0)) == "student.layers[0]"
    assert dotted(()) == ""


texts = st.text(alphabet="ab01:#-'\"\n\t é~.e{}[],&*!|>%@`?=<")
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts)
awkward = st.sampled_from(["1e-4", "yes", "no", "on", "~", "null", "010", "1:30", "0x1F", "1_0", "=", "<<", "*a", "#"])
documents = st.dictionaries(
    st.text(min_size=1, alphabet="abcdefgh_"),
    st.recursive(scalars | awkward, lambda inner: st.lists(inner, max_size=3), max_leaves=6),
)


@given(documents)
def test_what_is_dumped_reads_back_here_and_elsewhere(tmp_path_factory, document):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(document), encoding="utf-8")
    problems = []
    node = read_file(path, problems)
    assert not problems
    assert node.plain() == document
    assert yaml.safe_load(dump(document)) == document
