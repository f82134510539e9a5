"""The option `--config`: a command's options from a YAML file, and such a file of how a command was called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from mlx_starflow.errors import StarflowError


def _read_config(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """What the file says holds where the command line says nothing."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read_options(path, context.command)}


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML file with any of these options and arguments; what the command line says comes first.",
)


def read_options(path: Path, command: click.Command) -> dict[str, object]:
    """A command's options and arguments in a YAML file, by the names of the command's parameters.

    Keys are the options' long names and the arguments' names, with - or _; a null counts as left out. Values are as
    YAML reads them: click converts them as it does the words of a command line.

    Raises:
        StarflowError: the file cannot be read, is no mapping, or has a key that the command does not know.
    """
    from mlx_starflow.media.files import read_yaml

    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise StarflowError(f"{path} holds no options: write lines such as steps: 400")
    names: dict[str, str | None] = {}
    for parameter in sorted(command.params, key=lambda each: isinstance(each, click.Argument)):  # which come first
        spellings = [parameter.name or ""] if isinstance(parameter, click.Argument) else parameter.opts
        names.update({spelling.lstrip("-").replace("-", "_"): parameter.name for spelling in spellings})
    values = {}
    for key, value in content.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            raise StarflowError(f"{path}: there is no option {key}; see mlx-starflow {command.name} --help")
        if value is not None:
            values[name] = value
    return values


def save_options(context: click.Context, path: Path, chosen: Mapping[str, object]) -> None:
    """Write a file for `--config` with all that a command was told, and with what was chosen where it was told nothing.

    Raises:
        StarflowError: the file cannot be written.
    """
    import yaml

    from mlx_starflow.media.files import replacing

    options = {name: value for name, value in {**context.params, **chosen}.items() if value is not None}
    plain = {name.replace("_", "-"): str(v) if isinstance(v, Path) else v for name, v in options.items()}
    with replacing(path, makes_folder=True) as temporary:
        temporary.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
