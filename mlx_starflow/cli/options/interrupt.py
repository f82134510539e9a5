"""What Ctrl-C means to commands that go on where they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

INTERRUPTED = 130
"""The exit code of a command that was interrupted, as a shell expects."""


@contextmanager
def resumable(hint: str = "") -> Iterator[None]:
    """Ctrl-C in this block says `hint`, if there is one, and ends the program with 130, as a shell expects."""
    try:
        yield
    except KeyboardInterrupt:
        if hint:
            click.echo(hint, err=True)
        raise SystemExit(INTERRUPTED) from None
