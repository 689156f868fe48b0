"""Values of what models write as equations: exact, and nothing else has one."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.evaluate.equations import MAX_CHARACTERS, evaluate_equation


@pytest.mark.parametrize(
    "text, value",
    [
        ("( 8.0 - 3.0 )", 5),
        ("((2.0 * 3.0) - 1.0)", 5),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1/3*3", 1),
        ("-(-2) - +.5", Fraction(3, 2)),
        ("1,000", 1000),
        ("$1,234,567.5 / 2", Fraction(12345675, 20)),
        (" 18. ", 18),
        ("2 - 3 - 4", -5),
    ],
)
def test_value_is_exact(text, value):
    assert evaluate_equation(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9", "1e999999999", "1e5", "1//2", "5 % 2", "1 << 9999999", "0x10", "1_000", "1j", "True", "", "()", "(1", "1 2",
        "1,2", "1,00", "12,34,567", "(1, 2)", "x + 1", "abs(1)", "__import__('os').system('true')", "(1)(2)", "1 if 1 else 2", "[1]",
        "lambda: 1", "'1'", "1 == 1", "1 / 0", "1 / (2 - 2)", "1\n+ 2", "\x00", "\ud800", "١ + ٢", "1.2.3", "...", "~1", "not 1",
        "+ " * 240, "(" * 240 + "1" + ")" * 240, "-" * 490 + "1", "9" * (MAX_CHARACTERS + 1),
    ],
)  # fmt: skip
def test_nothing_else_has_a_value(text):
    started = time.perf_counter()
    value = evaluate_equation(text)
    assert value is None or text == "-" * 490 + "1" and value == 1  # signs alone are arithmetic
    assert time.perf_counter() - started < 1


trees = st.recursive(
    st.integers(0, 99).map(lambda number: (str(number), Fraction(number))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda parts: (f"({parts[0][0]} {parts[1]} {parts[2][0]})", _apply(parts[1], parts[0][1], parts[2][1]))
    ),
    max_leaves=20,
)


def _apply(sign, left, right):
    if left is None or right is None or sign == "/" and right == 0:
        return None
    return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[sign](right)


@given(trees)
def test_value_is_that_of_the_tree_that_was_written(tree):
    text, value = tree
    assert evaluate_equation(text) == (value if len(text) <= MAX_CHARACTERS else None)


@given(st.text(alphabet="0123456789.+-*/(), _exj\n", max_size=80))
def test_no_text_raises(text):
    value = evaluate_equation(text)
    assert value is None or isinstance(value, Fraction)


def test_equations_of_svamp_have_the_values_of_their_answers(assets):
    records = json.loads((assets / "data/svamp/SVAMP.json").read_text())
    assert len(records) == 1000
    wrong = [one for one in records if evaluate_equation(one["Equation"]) != Fraction(str(one["Answer"]))]
    assert [one["ID"] for one in wrong] == ["chal-680"]  # 4 - 2 + 3 is 5, and the set's own answer says 1
