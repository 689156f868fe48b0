"""YAML with line numbers, duplicate keys, numbers as people write them, and texts that would fill the memory."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minillm.config.loader.document import read_file, read_override
from minillm.config.loader.yaml_text import MOST_LEVELS, MOST_VALUES, dump, parse
from minillm.config.tree import Origin


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


def problem_of(text: str):
    problems = []
    assert parse(text, Origin("file.yaml"), problems) is None
    (problem,) = problems
    return problem


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 10_000 + "]" * 10_000,
        "a: " + "{b: " * 10_000 + "}" * 10_000,
        "\n".join(" " * depth + "a:" for depth in range(2_000)),
        "a:\n  " + "- " * 10_000,
    ],
    ids=["flow lists", "flow groups", "block groups", "block lists"],
)
def test_a_text_nested_without_end_is_one_problem(text):
    assert f"nested more than {MOST_LEVELS} levels deep" in problem_of(text).message


def test_any_depth_up_to_the_limit_is_read():
    node = parse("[" * MOST_LEVELS + "]" * MOST_LEVELS, Origin("x"), [])
    depth = 0
    while node.value:
        node, depth = node.value[0], depth + 1
    assert depth == MOST_LEVELS - 1


@pytest.mark.parametrize("form", ["[{}]", "{{x: [{}]}}", "{{<<: [{}]}}"], ids=["lists", "groups", "merge keys"])
def test_aliases_that_repeat_each_other_are_one_problem(form):
    """Ten lines that stand for 10^9 values."""
    lines = ["l0: &l0 " + ("{a: 1}" if "<<" in form else "[a]")]
    lines += [f"l{n}: &l{n} " + form.format(", ".join([f"*l{n - 1}"] * 10)) for n in range(1, 10)]
    problem = problem_of("\n".join(lines))
    assert f"more than {MOST_VALUES:,} keys and values" in problem.message
    assert problem.line is not None


def test_a_number_of_thousands_of_digits_is_named_and_not_shown():
    problems = []
    parse("seed: " + "9" * 5_000, Origin("x"), problems)
    assert "cannot be read as !!int" in problems[0].message and len(problems[0].message) < 150


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
