"""Reading and checking configs: of model directories, of the official release, and of Hugging Face checkpoints."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

MOST_LAYERS = 4096
"""Of a network; released ones have up to 48. Each is made before anything else is found wrong."""

MOST_LEVELS = 16
"""Resolutions of an autoencoder; each is half of the one before."""

MOST = 2**24
"""The largest size in a config; so many entries no vocabulary has, and no layer is so wide."""


@dataclass(frozen=True)
class ConfigKind:
    """The configs of one kind of network. Errors begin with its name: "flow config: ...".

    Attributes:
        name: of the network.
        notes: keys that do not matter to the network or are checked apart; so are those that begin with "_".
        strict: any other key that is no field of the config's dataclass is an error.
    """

    name: str
    notes: Collection[str] = ()
    strict: bool = True

    def require(self, holds: object, message: str) -> None:
        """Raise StarflowError with the message unless something holds."""
        if not holds:
            raise StarflowError(f"{self.name} config: {message}")

    def positive(self, **values: object) -> None:
        """Raise StarflowError unless every value, or every value in a tuple, is a positive integer."""
        for name, value in values.items():
            if isinstance(value, tuple):
                self.require(value, f"{name} is empty; it takes one number per resolution")
                self.positive(**{f"{name}[{index}]": one for index, one in enumerate(value)})
            else:
                whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
                self.require(whole, f"{name} must be a positive integer, not {_short(value)}")

    def choice(self, name: str, value: object, choices: Collection[object]) -> None:
        """Raise StarflowError unless a value is one of some choices."""
        known = isinstance(value, str | int | float) and value in choices
        words = " or ".join(map(str, choices)) if len(choices) < 3 else f"one of {', '.join(map(str, choices))}"
        self.require(known, f"{name} must be {words}, not {_short(value)}")

    def values(self, cls: type[DataclassInstance], config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config's dataclass that a file has, lists as tuples where the field is a tuple.

        A key whose value is null is left to its default.

        Raises:
            StarflowError: a key is unknown, or one without a default is missing.
        """
        known = {field.name: field for field in fields(cls) if field.init}
        unknown = [key for key in config if not (key in known or key in self.notes or str(key).startswith("_"))]
        if self.strict:
            self.require(
                not unknown,
                f"unknown key {', '.join(sorted(map(str, unknown)))[:200]}; the file may be of a newer version",
            )
        missing = [name for name, field in known.items() if field.default is MISSING and config.get(name) is None]
        self.require(not missing, f"missing key {', '.join(missing)}; use the file that came with the weights")
        return {name: self._value(field, config[name]) for name, field in known.items() if config.get(name) is not None}

    def _value(self, field: Field[Any], value: object) -> object:
        return self.typed(field.name, str(field.type), value, least=0 if field.default == 0 else 1)

    def typed(self, name: str, kind: str, value: Any, least: int = 1) -> Any:
        """A value of a file as what a field's annotation says, or StarflowError.

        Numbers that YAML 1.1 takes for text (1e-4), whole numbers that were written as 64.0 and switches that were
        written as 0 and 1 are taken for what is meant.

        Args:
            name: of the field.
            kind: its annotation, such as "int", "float | None" or "tuple[int, ...]".
            value: what the file holds.
            least: of whole numbers.
        """
        kind = kind.removesuffix(" | None")
        if kind == "int":
            whole = int(value) if isinstance(value, float) and value.is_integer() else value
            good = isinstance(whole, int) and not isinstance(whole, bool) and whole >= least
            what = "a positive integer" if least == 1 else f"an integer of at least {least}"
            self.require(good, f"{name} must be {what}, not {_short(value)}")
            self.require(whole <= MOST, f"{name} must be at most {MOST}, not {_short(value)}")
            return whole
        if kind == "float":
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            self.require(math.isfinite(number), f"{name} must be a number, not {_short(value)}")
            return number if isinstance(value, float | str) else value
        if kind == "bool":
            self.require(
                isinstance(value, int) and value in (0, 1), f"{name} must be true or false, not {_short(value)}"
            )
            return bool(value)
        if kind == "str":
            good = isinstance(value, str | int) and not isinstance(value, bool)
            self.require(good, f"{name} must be text, not {_short(value)}")
            return str(value)
        if kind.startswith("dict"):
            good = isinstance(value, dict) and all(isinstance(key, str) for key in value)
            self.require(good, f"{name} must hold names and values, not {_short(value)}")
            return value
        if kind.startswith(("tuple", "list")):
            if kind == "list[int]" and isinstance(value, str):  # as the official release writes it
                value = [int(word) if word.isdecimal() and len(word) < 9 else word for word in value.split()]
            good = isinstance(value, list | tuple) and len(value) <= MOST_LAYERS
            self.require(good, f"{name} must be a list, not {_short(value)}")
            each, least = kind.partition("[")[2].rstrip("]").partition(",")[0], 0 if kind == "list[int]" else 1
            items = [self.typed(f"{name}[{index}]", each, one, least) for index, one in enumerate(value)]
            return items if kind.startswith("list") else tuple(items)
        return value

    def read(self, cls: type[Config], config: Mapping[str, Any]) -> Config:
        """The config's dataclass, from a file. Raises StarflowError if a key or a value is not usable."""
        values = self.values(cls, config)
        try:
            return cls(**values)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise StarflowError(f"{self.name} config: {error}") from None


def _short(value: object) -> str:
    """A value of a file for a message, whatever it is."""
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = (
        ascii(value) if isinstance(value, str) else repr(value)[:100] if not isinstance(value, int) else _digits(value)
    )
    return text if len(text) <= 100 else text[:100] + "..."


def _digits(value: int) -> str:
    return str(value) if abs(value) < 10**80 else "a number of more than 80 digits"


PIPELINE = ConfigKind("pipeline")
"""How a model samples unless told otherwise."""

FLOW = ConfigKind("flow", ("model_type", "quantization", "pipeline", "fused"))


def write_config(config: DataclassInstance) -> dict[str, Any]:
    """What `ConfigKind.read` reads, without values that are defaults."""
    defaults = {field.name: field.default for field in fields(config)}
    return {key: value for key, value in asdict(config).items() if value != defaults[key]}


def plain_fields(settings: DataclassInstance) -> None:
    """Give a dataclass, frozen or not, Python's own numbers for NumPy's, which JSON and MLX do not know."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        plain = tuple(map(_own, value)) if isinstance(value, tuple) else _own(value)
        object.__setattr__(settings, item.name, plain)


def _own(value: Any) -> Any:
    # Told by what it has: help, which shows what configs choose from, loads no NumPy.
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def official_arguments(config: object) -> dict[str, Any]:
    """The arguments of an official YAML file that have a value. Raises StarflowError if it holds none."""
    arguments = config.get("arguments", config) if isinstance(config, Mapping) else None
    if isinstance(arguments, list) and all(isinstance(entry, Mapping) for entry in arguments):
        arguments = {key: value for entry in arguments for key, value in entry.items()}
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise StarflowError("this is not an official config: it must hold the model's arguments")
    return {key: value for key, value in arguments.items() if value is not None}


def known_arguments(cls: type[DataclassInstance], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that are fields of a config dataclass, as values of the fields' types."""
    known = {field.name: str(field.type) for field in fields(cls)}
    return {key: _plain(key, value, known[key]) for key, value in values.items() if key in known}


def _plain(key: str, value: Any, kind: str) -> Any:
    """The release writes its switches as 0 and 1, and some numbers as text."""
    if not isinstance(value, str) or kind not in ("bool", "int", "int | None", "float"):
        return value
    try:
        return float(value) if kind == "float" else int(value)
    except ValueError:
        raise StarflowError(f"flow config: {key} must be a number, not {_short(value)}") from None


def check_autoencoder(kind: ConfigKind, config: Mapping[str, Any], class_name: str, model_type: str) -> None:
    """Raise StarflowError if an autoencoder's `config.json` names another class of diffusers or another model type."""
    for key, expected in (("_class_name", class_name), ("model_type", model_type)):
        found = config.get(key, expected)
        kind.require(found == expected, f"{key} is {found!r}; it must be {expected!r}")
