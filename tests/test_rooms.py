"""Imports between the package's rooms go one way; `.importlinter` says which."""

from __future__ import annotations

from pathlib import Path

from helpers.layout import PACKAGE, run_in_installed_layout

LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
"""What the command `lint-imports` runs; `python -m importlinter.cli` would run nothing."""


def test_imports_go_one_way(tmp_path: Path) -> None:
    done = run_in_installed_layout(tmp_path, ["-c", LINT, "--no-cache"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_few_modules_stand_outside_the_rooms() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
