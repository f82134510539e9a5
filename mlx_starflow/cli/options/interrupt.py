"""What Ctrl-C, and the signal to terminate, mean to commands that go on where they were."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

INTERRUPTED = 130
"""The exit code of a command that was interrupted, as a shell expects."""


@contextmanager
def resumable(hint: str = "") -> Iterator[None]:
    """Ctrl-C in this block says `hint`, if there is one, and ends the program with 130, as a shell expects.

    So does SIGTERM, which batch systems send before they kill.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main else None
    try:
        yield
    except KeyboardInterrupt:
        if hint:
            click.echo(hint, err=True)
        raise SystemExit(INTERRUPTED) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
