"""What the server writes to standard error: a line for each request and job, plain or JSON. No prompts, no keys."""

from __future__ import annotations

import json
import sys
import threading
import time
from datetime import datetime, timezone
from typing import TextIO

from mlx_starflow.errors import printable


class Log:
    """Writes lines; any thread may.

    Args:
        as_json: one JSON object a line, with "time", "level", "event" and what there is to say; else words.
        stream: that is written to; standard error by default.
    """

    def __init__(self, *, as_json: bool = False, stream: TextIO | None = None):
        self._as_json, self._stream, self._lock = as_json, stream, threading.Lock()

    def info(self, event: str, **values: object) -> None:
        self._write("info", event, values)

    def error(self, event: str, **values: object) -> None:
        self._write("error", event, values)

    def _write(self, level: str, event: str, values: dict[str, object]) -> None:
        now = datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")
        if self._as_json:
            line = json.dumps({"time": now, "level": level, "event": event, **values}, default=str)
        else:
            said = " ".join(f"{name}={_word(value)}" for name, value in values.items() if name != "trace")
            line = f"{now} {level} {event} {said}" + (f"\n{values['trace']}" if "trace" in values else "")
        stream = self._stream or sys.stderr
        with self._lock:
            try:
                print(line, file=stream, flush=True)
            except (OSError, ValueError):  # nobody reads it any more
                return


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = printable(str(value))
    return json.dumps(text) if " " in text or not text else text
