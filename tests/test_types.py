"""mypy finds no mistake in the package; run with -m types."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.layout import run_in_installed_layout


@pytest.mark.types
def test_mypy_reports_nothing(tmp_path: Path) -> None:
    done = run_in_installed_layout(tmp_path, ["-m", "mypy", "-p", "mlx_starflow"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found" in done.stdout
