"""What a training says while it runs: lines of `log.jsonl`, and the words beside the progress bar."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.likelihood.nll import HALF_LOG_2PI
from mlx_starflow.media.files import is_regular, parse_json, read_bytes, replacing
from mlx_starflow.training.loop.reporting import NoReporter, Reporter, plain_numbers

NAME = "log.jsonl"

MOST_LOG = 1 << 30
"""Bytes of a log; a line has some two hundred."""

UNIT = "nats per dimension"
"""Of a flow's losses and NLL, with the constant log(2 pi) / 2, as `mlx-starflow score` gives them."""

_NATS = ("loss", "nll", "nll-text-only")
"""Numbers of a flow's step, which come without the constant."""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log's lines; what is none, such as one that a crash cut off, is left out.

    Raises:
        StarflowError: it cannot be read.
    """
    if not is_regular(folder / NAME):
        return []
    rows = []
    for line in read_bytes(folder / NAME, most=MOST_LOG).splitlines():
        with suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and isinstance(row.get("step", 0), int):
                rows.append(row)
    return rows


class RunLog:
    """Writes `folder/log.jsonl`, a JSON object a line.

    Args:
        folder: of the run.
        step: where the training goes on; lines after it, of steps that are done again, are taken out.
        writes: False: nothing is written.
        reporter: is told the numbers of each line too.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True, reporter: Reporter | None = None):
        self.folder, self.writes, self.reporter = folder, writes, reporter or NoReporter()
        self._began = time.monotonic()
        self._rows: list[Mapping[str, float]] = []
        self.samples = self.tokens = self.skipped = 0
        self.seconds = 0.0
        if writes and (folder / NAME).exists():
            rows = read_log(folder)
            kept = [_in_one_unit(row) for row in rows if row.get("step", 0) <= step]
            before = [row["elapsed"] for row in kept if isinstance(row.get("elapsed"), int | float)]
            self._began -= max(before, default=0.0)
            if kept != rows or (folder / NAME).read_bytes()[-1:] not in (b"\n", b""):
                with replacing(folder / NAME) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def add(self, row: Mapping[str, float], samples: int, tokens: int, seconds: float) -> None:
        """One step's numbers, what it read and how long it took."""
        self._rows.append(row)
        self.samples += samples
        self.tokens += tokens
        self.seconds += seconds

    @property
    def elapsed(self) -> float:
        """Seconds of the training, those of the runs that this one goes on with included, as far as the log knows."""
        return time.monotonic() - self._began

    def flush(self, step: int, lr: float, epoch: float = 0.0) -> str:
        """Write the means since the last time; returns words for the progress bar.

        `epoch` is how many passes over the data have been done.
        """
        line: dict[str, Any] = {"step": step, "epoch": round(epoch, 3), "elapsed": round(self.elapsed, 3)}
        for key in self._rows[0]:
            values = [row[key] for row in self._rows if math.isfinite(row.get(key, math.nan))]
            line[key] = round(float(np.mean(values)), 6) if values else None
        line = _in_one_unit(line)
        seconds = max(self.seconds, 1e-9)
        line["lr"] = lr
        if self.skipped:
            line["skipped"] = self.skipped
        line["samples_per_second"] = round(self.samples / seconds, 2)
        unit = " nats/dim" if "unit" in line else ""
        words = f"epoch {epoch:.1f}, " if epoch else ""
        words += f"loss {line['loss']:.4f}{unit}" if line["loss"] is not None else "all steps skipped"
        if self.tokens:
            line["tokens_per_second"] = round(self.tokens / seconds, 1)
            words += f", {self.tokens / seconds:.0f} tokens/s"
        line["memory_gb"] = round(mx.get_peak_memory() / 1e9, 3)
        self.write(line)
        self._rows = []
        self.samples = self.tokens = self.skipped = 0
        self.seconds = 0.0
        return f"{words}, {line['memory_gb']:.2f} GB"

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line. Raises StarflowError if that is not possible."""
        if not self.writes:
            return
        self.reporter.numbers(line["step"], plain_numbers(line))
        path = self.folder / NAME
        try:
            # In one write, so that a crash does not leave half a line.
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                text = (json.dumps(line) + "\n").encode()
                if os.write(file, text) < len(text):
                    raise OSError("no room left")
            finally:
                os.close(file)
        except OSError as error:
            raise StarflowError(
                f"cannot write {path}: {one_line(error)}; make room, and the same command resumes"
            ) from None


def _in_one_unit(row: dict[str, Any]) -> dict[str, Any]:
    """A line of a flow's steps in `UNIT`, which it names; lines of older versions do not, and lack the constant."""
    if "nll" not in row or "unit" in row:
        return row
    whole = {key: round(row[key] + HALF_LOG_2PI, 6) for key in _NATS if isinstance(row.get(key), float | int)}
    return {**row, **whole, "unit": UNIT}
