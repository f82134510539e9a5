"""Options whose value is the lines of a text file."""

from __future__ import annotations

from typing import Any

import click


class Lines(click.ParamType):
    """The lines of a file, or, for "-", of standard input: see `media.files.read_lines`."""

    name = "filename"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list[str]:
        from mlx_starflow.media.files import read_lines

        if isinstance(value, list):  # click converts what it has converted, if it was a default
            return value
        if not (lines := read_lines(value)):
            self.fail(f"{'standard input' if value == '-' else value} holds no text", param, context)
        return lines
