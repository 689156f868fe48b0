"""The ways to break a line of Python that a mutation run tries: one change each, as an edit of the source text.

What a reader sees of an error, annotations, decorators and docstrings stay as they are.
"""

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
# functions and methods of one signature that are taken for each other
NAMES = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "argmin": "argmax", "argmax": "argmin",
    "any": "all", "all": "any", "ceil": "floor", "floor": "ceil", "fmean": "fsum", "log_softmax": "softmax",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "zeros": "ones", "ones": "zeros",
}  # fmt: skip
METHODS = NAMES | {"sum": "mean", "mean": "sum", "sqrt": "rsqrt", "rsqrt": "sqrt"}
# methods that leave the shape as it is, and are left out
ELEMENTWISE = {"detach", "abs", "clamp", "exp", "log", "double", "float"}
# calls that declare, and compute nothing
DECLARATIONS = {"field", "TypeVar", "Literal", "Callable"}
# keyword arguments that say how and not what: without them nearly nothing changes
HARMLESS = {"strict", "encoding", "progress", "non_blocking"}


@dataclass(frozen=True)
class Mutant:
    """One change of a file: the bytes from `start` to `end` become `after`."""

    line: int
    last_line: int
    start: int
    end: int
    before: str
    after: str
    is_statement: bool

    def difference(self) -> tuple[str, str]:
        """Both texts without what they have in common, but for a few characters around the change."""
        first = len(os.path.commonprefix([self.before, self.after]))
        last = len(os.path.commonprefix([self.before[first:][::-1], self.after[first:][::-1]]))
        return tuple(
            f"`{text[max(0, first - 25) : min(len(text), len(text) - last + 25)]}`"
            for text in (self.before, self.after)
        )

    def applied_to(self, source: bytes) -> bytes:
        """The source with the change."""
        after = self.after if self.is_statement else f"({self.after})"
        return source[: self.start] + after.encode() + source[self.end :]


def mutants_of(source: bytes) -> list[Mutant]:
    """All mutants of a module's source, in the order of its lines. Each of them is valid Python."""
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    found = []
    for node, replacement in _visit(ast.parse(source)):
        start = begins[node.lineno - 1] + node.col_offset
        end = begins[node.end_lineno - 1] + node.end_col_offset
        texts = ast.unparse(node), ast.unparse(replacement)
        mutant = Mutant(node.lineno, node.end_lineno, start, end, *texts, isinstance(node, ast.stmt))
        try:
            ast.parse(mutant.applied_to(source))
        except SyntaxError:  # a bracketed keyword or target
            continue
        found.append(mutant)
    return sorted(dict.fromkeys(found), key=lambda mutant: (mutant.line, mutant.start, mutant.after))


def _visit(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(node, what takes its place) of a node and everything below it that behaviour depends on."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return
    if isinstance(node, ast.Call | ast.Subscript) and ast.unparse(_head(node)) in DECLARATIONS:
        return
    if isinstance(node, ast.keyword) and node.arg in HARMLESS:
        return
    if isinstance(node, ast.expr):
        yield from ((node, other) for other in _expressions(node))
    elif isinstance(node, ast.stmt):
        yield from ((node, other) for other in _statements(node))
    for test in _conditions(node):
        if not isinstance(test, ast.Compare | ast.UnaryOp | ast.BoolOp):  # those are changed as expressions
            yield test, ast.UnaryOp(ast.Not(), test)
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "type_params"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _visit(child)


def _head(node: ast.Call | ast.Subscript) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node.value


def _conditions(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.If(test) | ast.While(test):
            return [test]
        case ast.comprehension(ifs=tests):
            return tests
        case _:
            return []


def _expressions(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Compare(left, [operator], [right]):
            yield from (ast.Compare(left, [other()], [right]) for other in COMPARISONS[type(operator)])
        case ast.Compare(left, [first, second], [middle, right]):
            yield ast.Compare(left, [first], [middle])
            yield ast.Compare(middle, [second], [right])
        case ast.BinOp(left, operator, right) if not (_is_text(left) or _is_text(right)):
            if type(operator) in ARITHMETIC:
                yield ast.BinOp(left, ARITHMETIC[type(operator)](), right)
                yield left
                yield from [right] if isinstance(operator, ast.Add | ast.Mult) else []
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
            for place in range(len(values)):
                rest = values[:place] + values[place + 1 :]
                yield ast.BoolOp(operator, rest) if len(rest) > 1 else rest[0]
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
            yield from [ast.Constant(value - 1)] if value > 0 else []
        case ast.Call(function, arguments, keywords):
            for place, keyword in enumerate(keywords):
                if keyword.arg is not None and keyword.arg not in HARMLESS:
                    yield ast.Call(function, arguments, keywords[:place] + keywords[place + 1 :])
            match function:
                case ast.Name(name) if name in NAMES:
                    yield ast.Call(ast.Name(NAMES[name]), arguments, keywords)
                case ast.Attribute(owner, name) if name in METHODS:
                    yield ast.Call(ast.Attribute(owner, METHODS[name]), arguments, keywords)
                case ast.Attribute(owner, name) if name in ELEMENTWISE:
                    yield owner


def _statements(node: ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.AugAssign(target, operator, value):
            yield ast.Pass()
            if type(operator) in ARITHMETIC:
                yield ast.AugAssign(target, ARITHMETIC[type(operator)](), value)
        case ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.Assign(targets) if all(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
            yield ast.Pass()
        case ast.Return(value) if value is not None and not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(None)
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
