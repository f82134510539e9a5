"""The Python in README and docs runs, and passes mypy (-m types) and pyright (-m release) as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.layout import installed_layout, run_in_installed_layout
from helpers.pages import PAGES, python_blocks
from helpers.paths import ROOT

WITH_CODE = [page for page in PAGES if python_blocks(page)]

NEEDS_A_SERVER = "server.md"
"""The page whose code talks to one: tests/server/test_docs.py runs it."""


def code(page: Path) -> str:
    """All Python of a page: a block may use what the blocks before it have made."""
    return "\n".join(python_blocks(page))


def write_pages(folder: Path) -> Path:
    folder.mkdir()
    for page in WITH_CODE:
        (folder / f"{page.stem.replace('-', '_')}.py").write_text(code(page))
    return folder


def test_there_is_code() -> None:
    assert {"README.md", "quickstart.md", "python.md"} <= {page.name for page in WITH_CODE}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in WITH_CODE if page.name != NEEDS_A_SERVER], ids=lambda page: page.name
)
def test_it_runs(page: Path, belongings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two training steps, and samples to judge a model by, instead of as many as a reader would take."""
    monkeypatch.chdir(belongings)
    shorter = re.sub(r"\bsteps=\d+", "steps=2", re.sub(r"\bcount=\d+", "count=20", code(page)))
    exec(compile(shorter, page.name, "exec"), {"__name__": page.stem})


@pytest.mark.types
def test_mypy_reports_nothing(tmp_path: Path) -> None:
    done = run_in_installed_layout(tmp_path, ["-m", "mypy", str(write_pages(tmp_path / "pages"))])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.release
def test_pyright_reports_nothing(tmp_path: Path) -> None:
    installed_layout(tmp_path)
    write_pages(tmp_path / "pages")
    (tmp_path / "pyrightconfig.json").write_text('{"include": ["pages"], "pythonVersion": "3.10"}')
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors" in done.stdout


def test_extras_exist() -> None:
    known = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"\.\[([\w,]+)\]", page.read_text())
        assert {extra for each in named for extra in each.split(",")} <= known, page
