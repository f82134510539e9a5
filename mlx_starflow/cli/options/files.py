"""Options of a command from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml

from mlx_starflow.errors import StarflowError, one_line


def config_option(command: click.Command) -> click.Command:
    """Give a command `--config FILE`, a YAML mapping of its options and arguments; the command line comes first.

    Keys are the options' long names, with - or _. Using it raises StarflowError if the file cannot be read or has a key
    that the command does not know.
    """

    def read(context: click.Context, option: click.Parameter, path: Path | None) -> None:
        if path is not None:
            context.default_map = {**(context.default_map or {}), **_values(path, context.command)}

    option = click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="YAML file with any of these options; what the command line says comes first.",
        is_eager=True,
        expose_value=False,
        callback=read,
    )
    command.params.append(option)
    return command


def _values(path: Path, command: click.Command) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StarflowError(f"cannot read {path}: {one_line(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StarflowError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise StarflowError(f"{path} holds no options: write lines such as steps: 400")
    names: dict[str, click.Parameter] = {}
    for parameter in command.params:
        spellings = [parameter.name or ""] if isinstance(parameter, click.Argument) else parameter.opts
        names.update({spelling.lstrip("-").replace("-", "_"): parameter for spelling in spellings})
    values = {}
    for key, value in content.items():
        parameter = names.get(str(key).replace("-", "_"))
        if parameter is None:
            raise StarflowError(f"{path}: there is no option {key}; see mlx-starflow {command.name} --help")
        if value is not None:
            values[parameter.name] = value
    return values
