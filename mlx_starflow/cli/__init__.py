"""The command `mlx-starflow`. Every module here is one subcommand, a click command of the module's name."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from importlib import import_module

import click

from mlx_starflow import __version__, cpu
from mlx_starflow.cli import commands
from mlx_starflow.errors import StarflowError


class Commands(click.Group):
    """Finds subcommands by looking, and imports one only when it is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(context):
            return None
        return getattr(import_module(f"{commands.__name__}.{name}"), name)

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except StarflowError as error:
            raise _UserError(str(error)) from None
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else context.command_path
            raise _UserError(f"{error.format_message()} (see: {where} --help)") from None


class _UserError(click.ClickException):
    exit_code = 2


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-starflow")
def main() -> None:
    """STARFlow on your own machine: text to pictures with a normalizing flow, in MLX."""
    warnings.showwarning = _warn  # type: ignore[assignment]  # its other arguments are not shown
    cpu.check()


def _warn(message: Warning | str, *_: object) -> None:
    print(f"Warning: {message}", file=sys.stderr)
