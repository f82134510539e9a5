"""Running one subcommand of `mlx-starflow`, and what a user's mistake says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from mlx_starflow.cli import main
from mlx_starflow.errors import StarflowError


class Command:
    """A subcommand by its name; call it with its arguments."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *arguments: object) -> Result:
        return CliRunner().invoke(main, [self.name, *map(str, arguments)])

    def mistake(self, *arguments: object) -> str:
        """The one line that a user's mistake ends in."""
        result = self(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr


def message(function: Callable[..., object], *args: object, **options: object) -> str:
    """The one line of the StarflowError that this call raises."""
    with pytest.raises(StarflowError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
