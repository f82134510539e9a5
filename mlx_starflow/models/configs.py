"""Reading flow configs: a model directory's `config.json`, and the official release's YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

from mlx_starflow.errors import StarflowError

Config = TypeVar("Config")


def read_config(cls: type[Config], config: Mapping[str, Any]) -> Config:
    """A flow's config dataclass from a model directory's `config.json`; see `FlowConfig.from_dict`."""
    known = {field.name for field in fields(cls)}
    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization", "pipeline")}
    if unknown := sorted(set(values) - known):
        raise StarflowError(f"flow config: unknown key {', '.join(unknown)}; the file may be of a newer version")
    required = [field.name for field in fields(cls) if field.default is MISSING]
    if missing := [name for name in required if name not in values]:
        raise StarflowError(f"flow config: missing key {', '.join(missing)}")
    try:
        return cls(**values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise StarflowError(f"flow config: {error}") from None


def write_config(config: Any) -> dict[str, Any]:
    """What `read_config` reads, without values that are defaults."""
    defaults = {field.name: field.default for field in fields(config)}
    return {key: value for key, value in asdict(config).items() if value != defaults[key]}


def official_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an official YAML file that have a value."""
    arguments = config.get("arguments", config)
    if isinstance(arguments, list):
        arguments = {key: value for entry in arguments for key, value in entry.items()}
    return {key: value for key, value in arguments.items() if value is not None}


def known_arguments(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that are fields of a config dataclass, as values of the fields' types."""
    known = {field.name: field.type for field in fields(cls)}
    return {key: _plain(key, value, known[key]) for key, value in values.items() if key in known}


def _plain(key: str, value: Any, kind: str) -> Any:
    """YAML 1.1 reads 1e-4 as text, and the release writes its switches as 0 and 1."""
    try:
        if kind == "bool":
            return bool(int(value))
        if kind == "float":
            return float(value)
        if kind in ("int", "int | None"):
            return int(value)
    except (TypeError, ValueError):
        raise StarflowError(f"flow config: {key} must be a number, not {value!r}") from None
    return value
