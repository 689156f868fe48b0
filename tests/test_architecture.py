"""The layout: which room may import which, that no method is known by its name outside its own files, and file names.

The source is parsed, not imported. An exception is one place in the tree, listed here with the rule that it breaks; one
that no place needs any more is an error too.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from minillm.cli.arguments import BENCHMARKS
from minillm.config.method import MethodConfig
from minillm.config.root import StageConfig, method_classes

ROOT = Path(__file__).parents[1]
SOURCE = sorted(
    path
    for folder in ("minillm", "kernels", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)  # minillm/kernels and minillm/benchmarks
)

# Rooms from the ground up. A room may import those on the floors below its own, and itself.
FLOORS = (
    {"minillm"},  # the package's own __init__, with UserError
    {"kernels"},
    {"losses"},
    {"distributed", "integrations"},
    {"config", "storage"},
    {"config.checks"},
    {"config.loader"},
    {"models"},
    {"teachers", "data"},
    {"rollout"},
    {"rollout.local"},
    {"methods", "evaluate", "planning", "serving"},
    {"engine", "reporting"},
    {"train"},
    {"experiment"},
    {"cli"},
    {"__main__"},
    {"benchmarks"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# (file, the room that it imports and must not)
IMPORT_EXCEPTIONS: set[tuple[str, str]] = set()
# (file, the expression that knows a method by its name)
METHOD_NAME_EXCEPTIONS = {
    ("benchmarks/cases.py", "case.loss == 'minillm'"),  # a loss among those that are measured
    ("benchmarks/providers.py", "case.loss == 'minillm'"),
    ("benchmarks/step.py", "name == 'minillm'"),  # a trainer among those that are measured
    ("minillm/reporting/model_card.py", "name != 'minillm'"),  # the tag of the library, which one method has too
}
# names that two files have
FILE_NAME_EXCEPTIONS = {"arguments.py", "open.py", "test_adapters.py", "test_open.py"}


def module_of(path: Path) -> str:
    """minillm/config/keys.py -> minillm.config.keys; kernels/head.py -> minillm.kernels.head."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "minillm" else ("minillm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module: minillm.config.checks.facts -> config.checks; minillm.losses -> losses."""
    below = module.removeprefix("minillm").removeprefix(".").split(".")
    for depth in (2, 1):
        if ".".join(below[:depth]) in FLOOR:
            return ".".join(below[:depth])
    return "minillm" if below == [""] or not (ROOT / "minillm" / below[0]).exists() else below[0]


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The modules of minillm that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from minillm.distributed import collectives` imports a module, `from minillm import UserError` none
            yield from (f"{source}.{alias.name}" if room_of(source) == "minillm" else source for alias in node.names)


def parsed() -> Iterator[tuple[str, str, ast.Module]]:
    """(file, module, tree) of all source."""
    for path in SOURCE:
        yield str(path.relative_to(ROOT)), module_of(path), ast.parse(path.read_text(encoding="utf-8"))


def test_every_module_is_in_a_room():
    for path in SOURCE:
        assert room_of(module_of(path)) in FLOOR, path


def test_imports_point_one_way():
    wrong = set()
    for file, module, tree in parsed():
        room = room_of(module)
        for name in imports(tree, module, file.endswith("__init__.py")):
            if name.split(".")[0] == "minillm":
                other = room_of(name)
                if other != room and FLOOR[other] >= FLOOR[room]:
                    wrong.add((file, other))
    assert wrong == IMPORT_EXCEPTIONS


def test_kernels_import_nothing_of_minillm_but_themselves():
    for file, module, tree in parsed():
        if room_of(module) == "kernels":
            others = {name for name in imports(tree, module, False) if name.split(".")[0] == "minillm"}
            assert all(name.startswith("minillm.kernels") for name in others), file


def test_integrations_import_the_losses_alone():
    """They are for other trainers than minillm's: whoever pastes one needs torch, triton and that trainer's library."""
    for file, module, tree in parsed():
        if room_of(module) == "integrations":
            others = {
                name for name in imports(tree, module, file.endswith("__init__.py")) if name.startswith("minillm")
            }
            assert all(room_of(name) in ("integrations", "losses") for name in others), file


def test_an_import_upwards_is_found():
    tree = ast.parse("def f():\n    from minillm.config.loader.run_plan import load_run\nimport minillm.cli.main\n")
    rooms = {room_of(name) for name in imports(tree, "minillm.config.keys", False)}
    assert rooms == {"config.loader", "cli"}
    relative = ast.parse("from .loader import run_plan\nfrom ..train import run\n")
    assert set(imports(relative, "minillm.config", True)) == {"minillm.config.loader", "minillm.train"}


def method_names() -> set[str]:
    """The names of all methods that the configuration knows."""
    return {
        get_args(one.model_fields["name"].annotation)[0]
        for one in get_args(StageConfig.model_fields["method"].annotation)
    }


def test_the_files_of_a_method_are_called_after_it():
    for name, keys in method_classes().items():
        assert keys.__module__ == f"minillm.config.methods.{name}_keys"
        assert (ROOT / "minillm" / "methods" / f"{name}.py").exists()


def is_name_of_method(node: ast.AST) -> bool:
    """Whether an expression is the name of a method: method.name, config.method.name, case.method."""
    if not isinstance(node, ast.Attribute) or node.attr != "name":
        return isinstance(node, ast.Attribute) and node.attr == "method"
    owner = node.value
    return (
        isinstance(owner, ast.Attribute | ast.Name)
        and (owner.attr if isinstance(owner, ast.Attribute) else owner.id) == "method"
    )


def constants(node: ast.AST) -> set[str]:
    """The texts that a comparison compares to: "kd", or those of ("kd", "sft")."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def knows_a_method(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression tells methods apart by their name."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return (
            any(map(is_name_of_method, sides))
            and not _compares_to_none(node)
            or any(constants(side) & names for side in sides)
        )
    if isinstance(node, ast.Subscript):
        return is_name_of_method(node.slice) and not isinstance(node.ctx, ast.Store)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
        return bool(node.args) and is_name_of_method(node.args[0])
    if isinstance(node, ast.Dict):
        return len({text for key in node.keys if key is not None for text in constants(key)} & names) > 1
    if isinstance(node, ast.Match):
        return is_name_of_method(node.subject)
    return isinstance(node, ast.MatchValue) and bool(constants(node.value) & names)


def _compares_to_none(node: ast.Compare) -> bool:
    return all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops)


def test_no_method_is_known_by_its_name_outside_its_own_files():
    names, found = method_names(), set()
    assert {"minillm", "sft", "kd"} <= names
    for file, module, tree in parsed():
        if room_of(module) == "methods":
            continue
        own = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and _is_of_a_method(node)]
        inside = {id(node) for one in own for node in ast.walk(one)}
        for node in ast.walk(tree):
            if id(node) not in inside and knows_a_method(node, names):
                found.add((file, ast.unparse(node)))
    assert found == METHOD_NAME_EXCEPTIONS


def _is_of_a_method(node: ast.ClassDef) -> bool:
    """Whether a class is the configuration of one method."""
    return any(isinstance(base, ast.Name) and base.id == MethodConfig.__name__ for base in node.bases)


@pytest.mark.parametrize(
    "text",
    [
        'method.name == "x"',
        'config.method.name in ("x", "y")',
        'name != "seqkd"',
        'kind in ["sft", "other"]',
        "TABLE[config.method.name]",
        "TABLE.get(method.name, 3)",
        '{"sft": 1, "kd": 2}',
        'case.method != "sft"',
    ],
)
def test_ways_to_know_a_method_are_found(text):
    (expression,) = ast.parse(text).body
    assert knows_a_method(expression.value, method_names())


def test_a_match_on_a_method_is_found():
    (statement,) = ast.parse('match method.name:\n    case "kd":\n        pass\n').body
    assert knows_a_method(statement, method_names())
    assert knows_a_method(statement.cases[0].pattern, method_names())


@pytest.mark.parametrize(
    "text",
    [
        'f"method {method.name}"',
        "other.name == 3",
        "config.method is None",
        '{"kd": 1}',
        "TABLE[method]",
        "print(method.name)",
    ],
)
def test_what_only_says_the_name_is_fine(text):
    (expression,) = ast.parse(text).body
    assert not any(knows_a_method(node, method_names()) for node in ast.walk(expression))


def test_the_root_of_the_package_holds_folders_three_modules_and_the_mark_of_types():
    files = {path.name for path in (ROOT / "minillm").iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "losses.py", "py.typed"}
    folders = {path.name for path in (ROOT / "minillm").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {room for room in FLOOR if (ROOT / "minillm" / room).is_dir()}


def test_a_file_name_appears_once():
    verbs = {ROOT / "benchmarks" / f"{name}.py" for name in BENCHMARKS}
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    names = Counter(path.name for path in [*SOURCE, *tests] if path.name != "__init__.py" and path not in verbs)
    assert {name for name, count in names.items() if count > 1} == FILE_NAME_EXCEPTIONS


def test_docstrings_begin_with_what_a_thing_is_and_not_with_a_question():
    questions = {"What", "How", "Whether", "Which", "Who", "Why"}
    for file, _, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                assert (ast.get_docstring(node) or "-").split()[0] not in questions, (file, getattr(node, "name", ""))
