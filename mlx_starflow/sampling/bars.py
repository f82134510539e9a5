"""Progress bars; where there is no terminal, a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 60.0
"""Between two lines, and before the first: what takes less says nothing."""


class Bar(tqdm):
    """tqdm's bar. With `disable` None and no terminal it prints how far it is, and how long that took, once a minute.

    Arguments are those of `tqdm`, which is silent there.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, *, disable: bool | None = False, **options: Any):
        stream = options.get("file") or sys.stderr
        self._in_lines = disable is None and not stream.isatty()
        if self._in_lines:
            options |= {"mininterval": SECONDS, "delay": SECONDS, "miniters": 1}
        self._is_closed, self._said = False, time.monotonic()
        super().__init__(iterable, disable=bool(disable), **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._in_lines:
            super().display(msg, pos)
        elif msg is None and time.monotonic() - self._said >= SECONDS:
            print(self.line(), file=self.fp, flush=True)
            self._said = time.monotonic()

    def clear(self, nolock: bool = False) -> None:
        if not self._in_lines:
            super().clear(nolock)

    def line(self) -> str:
        """How far it is: "sampling: 30 of 64 tok, 01:20 so far, about 01:31 left"; and what is beside the bar."""
        facts = self.format_dict
        done, total, elapsed, speed = facts["n"], facts["total"], facts["elapsed"], facts["rate"]
        since_start = done - facts["initial"]
        speed = speed or (since_start / elapsed if elapsed else 0)
        of = f" of {total}" if total else ""
        left = f", about {self.format_interval((total - done) / speed)} left" if total and speed else ""
        beside = f"; {facts['postfix']}" if facts["postfix"] else ""
        so_far = f"{self.format_interval(elapsed)} so far"
        return f"{facts['prefix'] or 'done'}: {done}{of} {self.unit}, {so_far}{left}{beside}"

    def close(self) -> None:
        if not self._in_lines:
            super().close()
        elif not self._is_closed:
            self._is_closed = True
            self._decr_instances(self)
