"""Which tests depend on `--dtype`: a run in another precision than float32 leaves the others out, of itself.

The option acts through two functions alone, which say what MLX computes on. A test computes the same whatever it is if
it never calls them, and has no fixture that did, nor one that it shares with a test that did: a server, for instance,
that has loaded a model since. Every run notes which ask, in pytest's cache. A run of the whole suite in another
precision leaves out those that passed without asking, as long as no file has changed since, and counts them as
deselected. Without such notes, and where files are named, every test is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest

from mlx_starflow.model_dir import weights

KEY = "mlx-starflow/asked"

SOURCES = ("convert", "docs", "examples", "mlx_starflow", "tests", "README.md", "setup.py")
"""What tests depend on."""


@dataclass
class Report:
    """What is known of a test."""

    passed: bool = True
    asked: bool = False
    shared: set[str] = field(default_factory=set)


class AskedPrecision:
    """A pytest plugin, in every worker; made after `weights.device` and `weights.chip_generation` are what they are to
    be in this run."""

    def __init__(self, config: pytest.Config):
        self._config = config
        self._code = _digest(config.rootpath, f"{mx.__version__}, {mx.default_device()}")
        self._test, self._fixtures = "", []
        self._asked: set[str] = set()
        self._asked_fixtures: set[str] = set()
        self._shared: set[str] = set()
        self._reports: dict[str, Report] = {}
        for name in ("device", "chip_generation"):
            setattr(weights, name, self._noting(getattr(weights, name)))

    def _noting(self, function):
        def asked():
            self._asked.add(self._test)
            self._asked_fixtures.update(self._fixtures)
            return function()

        return asked

    # ---- what asks; fixtures are known by where they are defined and by name

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._test, self._fixtures = item.nodeid, []
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Iterator[None]:
        fixture = f"{fixturedef.baseid}::{fixturedef.argname}"
        if fixturedef.baseid and fixturedef.scope != "function":
            self._shared.add(fixture)
        self._fixtures.append(fixture)
        try:
            return (yield)
        finally:
            self._fixtures.pop()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        names = cast(pytest.Function, item).fixturenames

        def has(fixture: str) -> bool:
            base, _, name = fixture.rpartition("::")
            return name in names and item.nodeid.startswith(base)

        report.asked_precision = item.nodeid in self._asked or any(map(has, self._asked_fixtures))
        report.shared_fixtures = [*filter(has, self._shared)]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the process that the workers report to."""
        known = self._reports.setdefault(report.nodeid, Report())
        known.passed &= report.passed
        known.asked |= report.asked_precision
        known.shared.update(report.shared_fixtures)

    def _found(self) -> dict[str, bool]:
        """Whether each test asked."""
        asked = {fixture for report in self._reports.values() if report.asked for fixture in report.shared}
        return {
            name: report.asked or not report.passed or bool(report.shared & asked)
            for name, report in self._reports.items()
        }

    # ---- notes

    def _notes(self) -> dict[str, bool]:
        """Whether each test asked, as far as it has been run with the files as they are."""
        notes = self._config.cache.get(KEY, {})
        return notes["asked"] if notes.get("code") == self._code else {}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(self._config, "workerinput") and self._reports:
            asked, found = self._notes(), self._found()
            both = {name: asked.get(name, False) or found.get(name, False) for name in asked | found}
            self._config.cache.set(KEY, {"code": self._code, "asked": both})

    def _may_leave_out(self) -> bool:
        named = self._config.args_source is pytest.Config.ArgsSource.ARGS
        return not named and self._config.option.dtype != "float32" and bool(self._notes())

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not self._may_leave_out():
            return
        asked = self._notes()
        config.hook.pytest_deselected(items=[item for item in items if not asked.get(item.nodeid, True)])
        items[:] = [item for item in items if asked.get(item.nodeid, True)]

    def pytest_report_header(self, config: pytest.Config) -> str | None:
        if not self._may_leave_out():
            return None
        return f"--dtype {config.option.dtype}: tests that passed without asking for a precision are left out"


def _digest(root: Path, machine: str) -> str:
    digest = hashlib.sha256(machine.encode())
    for name in SOURCES:
        for path in sorted([root / name, *(root / name).rglob("*")]):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
