"""The exact value of an arithmetic expression that a model wrote, without running any of it."""

import ast
import operator
import re
import warnings
from collections.abc import Callable
from fractions import Fraction

# Far beyond any word problem, and short enough that nothing which can be written in it takes long.
MAX_CHARACTERS = 500
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_ALLOWED = re.compile(r"[0-9.+\-*/() \t]*")
_THOUSANDS = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9,])")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate_equation(text: str) -> Fraction | None:
    """The value of numbers, + - * / and parentheses as an exact rational; None for any other text.

    Decimals are exact (0.1 is one tenth). Commas between thousands and a dollar sign before a number are left out. Powers,
    exponents, names, calls, a division by zero and texts over MAX_CHARACTERS have no value.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = _THOUSANDS.sub(lambda found: found[1].replace(",", ""), text.strip().replace("$", ""))
    if not _ALLOWED.fullmatch(text):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice about what it parses
            tree = ast.parse(text.strip(), mode="eval")
        return _value(tree.body, text.strip())
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, text: str) -> Fraction:
    """Raises ValueError for a node of any other kind."""
    if isinstance(node, ast.Constant):
        number = text[node.col_offset : node.end_col_offset]  # Python would read 0.1 as a binary fraction
        if _NUMBER.fullmatch(number):
            return Fraction(number)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand, text))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, text), _value(node.right, text))
    raise ValueError(ast.dump(node)[:80])
