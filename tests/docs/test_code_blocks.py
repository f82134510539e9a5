"""The Python in README and docs passes mypy as it stands; run with -m types."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.layout import run_in_installed_layout
from helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def code(page: Path) -> str:
    """All Python of a page: a block may use what the blocks before it have made."""
    return "\n".join(BLOCK.findall(page.read_text()))


def test_there_is_code() -> None:
    assert code(ROOT / "README.md")


@pytest.mark.types
def test_mypy_reports_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    for page in PAGES:
        if text := code(page):
            (folder / f"{page.stem.replace('-', '_')}.py").write_text(text)
    done = run_in_installed_layout(tmp_path, ["-m", "mypy", str(folder)])
    assert done.returncode == 0, done.stdout + done.stderr
