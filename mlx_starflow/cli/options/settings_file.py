"""Settings of a command in a YAML file: flags by their names, with or without dashes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import replacing


def read_settings(path: Path, known: Collection[str]) -> dict[str, Any]:
    """A file's settings by their names with underscores.

    Raises:
        StarflowError: the file cannot be read, is no mapping, or has a key that is not among `known`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise StarflowError(f"cannot read {path}: {one_line(error)}") from None
    except yaml.YAMLError as error:
        raise StarflowError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise StarflowError(f"{path} must hold lines such as 'batch-size: 32'")
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    if unknown := sorted(set(settings) - set(known)):
        flags = ", ".join(name.replace("_", "-") for name in sorted(known))
        raise StarflowError(f"{path}: unknown setting {unknown[0].replace('_', '-')!r}; known are {flags}")
    # YAML reads 1e-3 as a text, unlike 1.0e-3; flags are texts on a command line anyway.
    return settings


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings that `read_settings` reads. Raises StarflowError."""
    plain = {name.replace("_", "-"): str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
