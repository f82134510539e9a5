"""Reading configs: model directories', the official release's YAML files, and those of diffusers' autoencoders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def check_autoencoder(config: Mapping[str, Any], class_name: str, model_type: str) -> None:
    """Raise StarflowError if an autoencoder's `config.json` names another class of diffusers or another model type."""
    for key, expected in (("_class_name", class_name), ("model_type", model_type)):
        if (found := config.get(key, expected)) != expected:
            raise StarflowError(f"autoencoder config: {key} is {found!r}; it must be {expected!r}")


def autoencoder_settings(
    cls: type, config: Mapping[str, Any], others: Collection[str], class_name: str
) -> dict[str, Any]:
    """The fields of an autoencoder's config dataclass that its `config.json` has; keys with "_" are notes.

    Raises:
        StarflowError: a key is neither a field nor one of `others`, or a field without a default is missing.
    """
    known = {field.name: field for field in fields(cls)}
    for key in config:
        if key not in known and key not in others and not key.startswith("_"):
            raise StarflowError(f"autoencoder config: {key} is not a setting of an {class_name}")
    values = {name: config[name] for name in known if config.get(name) is not None}
    for name, field in known.items():
        if field.default is MISSING and name not in values:
            raise StarflowError(f"autoencoder config: {name} is missing; use the config.json of the checkpoint")
    return values
