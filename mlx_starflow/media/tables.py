"""Tables of results as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_starflow.media.files import replacing
from mlx_starflow.media.outputs import STDOUT


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows of plain values, with a line of names; "-" is standard output. Lists are left out.

    A value that only some rows have is empty in the others.

    Raises:
        StarflowError: it cannot be written.
    """
    lists = {name for row in rows for name, value in row.items() if isinstance(value, list | dict)}
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in lists]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(text.getvalue(), path)


def write_json(content: Any, path: Path) -> None:
    """Plain values, indented; "-" is standard output. Raises StarflowError if it cannot be written."""
    _write(json.dumps(content, indent=1, allow_nan=False) + "\n", path)


def _write(text: str, path: Path) -> None:
    if path == STDOUT:
        sys.stdout.write(text)
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no text
