"""What Ctrl-C, and the signal to terminate, mean to commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

INTERRUPTED = 130
"""The exit code of a command that was interrupted, as a shell expects."""


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """In this block SIGTERM, which batch systems send before they kill, does what Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def resumable(hint: str | Callable[[], str] = "") -> Iterator[None]:
    """Ctrl-C, or SIGTERM, in this block says `hint`, if there is one, and ends the program with 130.

    A hint that depends on what has been done by then is a function.
    """
    with terminated_as_interrupted():
        try:
            yield
        except KeyboardInterrupt:
            if hint:
                click.echo(hint if isinstance(hint, str) else hint(), err=True)
            raise SystemExit(INTERRUPTED) from None
