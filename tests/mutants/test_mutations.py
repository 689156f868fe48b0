"""What a mutation run breaks, and that each change is of one place and valid."""

import ast

import pytest

from tests.mutants.mutations import mutants_of


def changes(text: str) -> set[str]:
    """The sources that come of one change each."""
    source = text.encode()
    return {ast.unparse(ast.parse(mutant.applied_to(source))) for mutant in mutants_of(source)}


@pytest.mark.parametrize(
    "text, broken",
    [
        ("x = a < b", {"x = a <= b", "x = a >= b"}),
        ("x = a * b", {"x = a / b", "x = a", "x = b"}),
        ("x = a - b", {"x = a + b", "x = a"}),
        ("x = not a", {"x = a"}),
        ("x = a and b", {"x = a or b", "x = a", "x = b"}),
        ("x = a if b else c", {"x = c if b else a"}),
        ("x = 3", {"x = 4", "x = 2"}),
        ("x = True", {"x = False"}),
        ("x = max(a, b)", {"x = min(a, b)"}),
        ("x = a.mean()", {"x = a.sum()"}),
        ("x = f(a, b=c)", {"x = f(a)"}),
        ("x += a", {"pass", "x -= a"}),
        ("f(a)", {"pass"}),
        ("a.x = b", {"pass"}),
        ("if a:\n    x = b", {"if not a:\n    x = b"}),
        ("def f():\n    return a", {"def f():\n    return"}),
    ],
)
def test_a_line_is_broken_in_these_ways(text, broken):
    assert changes(text) == broken


@pytest.mark.parametrize(
    "text",
    [
        '"""A docstring of 3 words."""',
        'raise ValueError(f"{a + 1} of {2}")',
        "x: Literal[3]",
        "@cached(size=3)\ndef f(): pass",
        "x = 'a' + 'b'",
        "x = zip(a, b, strict=True)",
    ],
)
def test_what_changes_no_result_is_left_alone(text):
    assert changes(text) == set()


def test_text_before_the_change_may_be_of_more_than_one_byte_a_letter():
    (mutant,) = mutants_of('x = "é", not a  # ü\n'.encode())
    assert mutant.applied_to('x = "é", not a  # ü\n'.encode()).decode() == 'x = "é", (a)  # ü\n'


def test_the_difference_is_shown_without_what_stays():
    (mutant,) = mutants_of(b"x = call(a_long_argument_that_stays_as_it_is, another_one, option=value)")
    assert mutant.difference() == ("`ays_as_it_is, another_one, option=value)`", "`ays_as_it_is, another_one)`")
