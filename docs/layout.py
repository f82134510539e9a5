"""A hook of MkDocs: the reference reads the package as it is installed, with the folder `convert/` inside it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_FOLDER = tempfile.TemporaryDirectory(prefix="mlx-starflow-docs-")
"""Kept until the process ends: `mkdocs serve` builds more than once."""


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    root = Path(config.config_file_path).parent
    package = Path(_FOLDER.name) / "mlx_starflow"
    if not package.exists():
        package.mkdir()
        for path in (*(root / "mlx_starflow").iterdir(), root / "convert"):
            (package / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_FOLDER.name]
    return config
