"""Running one subcommand of `mlx-starflow` in a test."""

from __future__ import annotations

from click.testing import CliRunner, Result

from mlx_starflow.cli import main


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
