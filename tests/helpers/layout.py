"""The package as it is installed: in a checkout, `mlx_starflow.convert` lies beside the package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.paths import ROOT

PACKAGE = ROOT / "mlx_starflow"


def installed_layout(folder: Path) -> None:
    """Fill an empty folder with the package, by links, and the tools' configs."""
    package = folder / "mlx_starflow"
    package.mkdir()
    for path in (*PACKAGE.iterdir(), ROOT / "convert"):
        (package / path.name).symlink_to(path)
    for name in (".importlinter", ".mypy.ini"):
        (folder / name).symlink_to(ROOT / name)


def run_in_installed_layout(folder: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in an empty folder that holds the package, by links, and the tools' configs."""
    installed_layout(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
