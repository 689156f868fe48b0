"""Which tests run which lines: a pytest plugin that measures it, and the choice of tests for a mutant."""

import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

IMPORT = ""  # the context of what runs while modules are read
OPTIMIZED = 1  # a flag of the code of functions; modules and bodies of classes lack it


class Reached:
    """Lines by the tests that run them, of one process."""

    def __init__(self, contexts: dict[str, dict[int, list[str]]], seconds: dict[str, float]):
        self.contexts = contexts  # file -> line -> tests, files of tests, or IMPORT
        self.seconds = seconds  # of the tests that pass

    def tests_of(self, file: str, lines: Iterable[int]) -> list[str]:
        """The tests that run one of the lines, namesakes first, then the quickest; none where no test does.

        What runs while the module is read is reached by every test of the module.
        """
        by_line = self.contexts.get(file, {})
        contexts = {context for line in lines for context in by_line.get(line, ())}
        if contexts == {IMPORT}:
            contexts = {context for found in by_line.values() for context in found}
        # a fixture of more than one test is reached by the whole file
        chosen = [test for test in self.seconds if test in contexts or test.partition("::")[0] in contexts]
        namesake = f"/test_{Path(file).stem}.py::"
        return sorted(chosen, key=lambda test: (namesake not in test, self.seconds[test]))


class ReachPlugin:
    """Traces the files below `sources` and writes what each test runs of them to `path`."""

    def __init__(self, sources: Iterable[Path], path: Path):
        self.prefixes, self.path = tuple(f"{source.resolve()}{os.sep}" for source in sources), path
        self.context = IMPORT
        self.reached: dict[str, dict[int, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.files: dict[str, str] = {}  # as the code has it -> resolved, or "" of files that are not traced

    def _call(self, frame, event, _):
        name = frame.f_code.co_filename
        if name not in self.files:
            resolved = str(Path(name).resolve())
            self.files[name] = resolved if resolved.startswith(self.prefixes) else ""
        if not self.files[name]:
            return None
        lines = self.reached[self.files[name]]
        while_read = not frame.f_code.co_flags & OPTIMIZED

        def line(frame, event, _):
            lines[frame.f_lineno][IMPORT if while_read else self.context] = None
            return line

        return line(frame, event, None)

    def start(self) -> None:
        """Begin before pytest does, whose first work is to import conftest files."""
        threading.settrace(self._call)
        sys.settrace(self._call)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.context = item.nodeid
        try:
            return (yield)
        finally:
            self.context = IMPORT

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        before = self.context
        if fixturedef.scope != "function":
            self.context = before.partition("::")[0]
        try:
            return (yield)
        finally:
            self.context = before

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        sys.settrace(None)
        threading.settrace(None)
        contexts = {file: {line: list(found) for line, found in lines.items()} for file, lines in self.reached.items()}
        seconds = {test: spent for test, spent in self.seconds.items() if test not in self.failed}
        modules = [name for name in sys.modules if name.partition(".")[0] not in ("minillm", "tests", "__main__")]
        found = {"contexts": contexts, "seconds": seconds, "modules": modules, "failed": sorted(self.failed)}
        self.path.write_text(json.dumps(found))


class ChoicePlugin:
    """Runs the given tests alone, in their order."""

    def __init__(self, tests: list[str]):
        self.place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted(
            (item for item in items if item.nodeid in self.place), key=lambda item: self.place[item.nodeid]
        )
