"""The command `mlx-starflow`. Every module here is one subcommand, a click command of the module's name."""

from __future__ import annotations

import errno
import io
import os
import pkgutil
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from importlib import import_module
from typing import Any

import click

from mlx_starflow import __version__, cpu
from mlx_starflow.cli import commands
from mlx_starflow.cli.options.groups import Group
from mlx_starflow.cli.options.interrupt import INTERRUPTED, terminated_as_interrupted
from mlx_starflow.errors import StarflowError, one_line, printable


class Commands(Group):
    """Finds subcommands by looking, and imports one only when it is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(context):
            return None
        return getattr(import_module(f"{commands.__name__}.{name}"), name)

    def main(self, *arguments: Any, **options: Any) -> Any:
        _occupy_standard_streams()
        return super().main(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        if sys.stdout is None:
            raise _UserError("standard output is closed: send it to a file, or to /dev/null")
        with terminated_as_interrupted():
            try:
                result = super().invoke(context)
                _flush()
                return result
            except StarflowError as error:
                raise _UserError(str(error)) from None
            except click.exceptions.NoArgsIsHelpError:
                raise
            except click.UsageError as error:
                where = error.ctx.command_path if error.ctx else context.command_path
                raise _UserError(f"{error.format_message()} (see: {where} --help)") from None
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except KeyboardInterrupt:
                click.echo("stopped", err=True)
                raise SystemExit(INTERRUPTED) from None
            except BrokenPipeError:  # whoever read the output has seen enough, which click knows how to end
                raise
            except Exception as error:
                raise _UserError(_unexpected(error)) from None


def _occupy_standard_streams() -> None:
    """Give the numbers of streams that are closed to /dev/null: a file that got one would be read, or printed into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None:  # libraries write to it without looking
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _flush() -> None:
    """What was printed has arrived. Raises StarflowError if standard output cannot take it, as a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise StarflowError(f"standard output cannot be written: {one_line(error)}") from None


def _drop_output() -> None:
    """Let Python's last flush of standard output succeed: that it cannot be written has been said."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _unexpected(error: Exception) -> str:
    """One line about an exception that nobody foresaw, and a file that tells more."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        _drop_output()
        return f"the output cannot be written: {one_line(error)}"
    what = f"{type(error).__name__}: {one_line(error)}"[:300]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="mlx-starflow-", suffix=".txt", encoding="utf-8", errors="backslashreplace", delete=False
        ) as file:
            file.write(f"mlx-starflow {__version__}, Python {sys.version}\n\n")
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return f"this should not have happened: {what}"
    return f"this should not have happened: {what}; please report it with the file {file.name}"


class _UserError(click.ClickException):
    """A mistake in one line, whatever names it quotes."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(printable(" ".join(message.splitlines())))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="mlx-starflow")
def main() -> None:
    """STARFlow on your own machine: text to pictures with a normalizing flow, in MLX."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    warnings.showwarning = _warn  # type: ignore[assignment]  # its other arguments are not shown
    cpu.check()


def _warn(message: Warning | str, *_: object) -> None:
    print(f"Warning: {printable(str(message))}", file=sys.stderr)
