"""Reading and checking configs: of model directories, of the official release, and of Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)


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
                self.require(whole, f"{name} must be a positive integer, not {value!r}")

    def choice(self, name: str, value: object, choices: Collection[object]) -> None:
        """Raise StarflowError unless a value is one of some choices."""
        words = " or ".join(map(str, choices)) if len(choices) < 3 else f"one of {', '.join(map(str, choices))}"
        self.require(value in choices, f"{name} must be {words}, not {value!r}")

    def values(self, cls: type[DataclassInstance], config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config's dataclass that a file has, lists as tuples where the field is a tuple.

        A key whose value is null is left to its default.

        Raises:
            StarflowError: a key is unknown, or one without a default is missing.
        """
        known = {field.name: field for field in fields(cls) if field.init}
        unknown = [key for key in config if not (key in known or key in self.notes or key.startswith("_"))]
        if self.strict:
            self.require(not unknown, f"unknown key {', '.join(sorted(unknown))}; the file may be of a newer version")
        missing = [name for name, field in known.items() if field.default is MISSING and config.get(name) is None]
        self.require(not missing, f"missing key {', '.join(missing)}; use the file that came with the weights")
        return {name: self._value(field, config[name]) for name, field in known.items() if config.get(name) is not None}

    def _value(self, field: Field[Any], value: object) -> object:
        if "tuple" not in str(field.type):
            return value
        self.require(isinstance(value, list | tuple), f"{field.name} must be a list, not {value!r}")
        return tuple(value)  # type: ignore[arg-type]  # checked above

    def read(self, cls: type[Config], config: Mapping[str, Any]) -> Config:
        """The config's dataclass, from a file. Raises StarflowError if a key or a value is not usable."""
        values = self.values(cls, config)
        try:
            return cls(**values)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise StarflowError(f"{self.name} config: {error}") from None


FLOW = ConfigKind("flow", ("model_type", "quantization", "pipeline"))


def write_config(config: DataclassInstance) -> dict[str, Any]:
    """What `ConfigKind.read` reads, without values that are defaults."""
    defaults = {field.name: field.default for field in fields(config)}
    return {key: value for key, value in asdict(config).items() if value != defaults[key]}


def official_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an official YAML file that have a value."""
    arguments = config.get("arguments", config)
    if isinstance(arguments, list):
        arguments = {key: value for entry in arguments for key, value in entry.items()}
    return {key: value for key, value in arguments.items() if value is not None}


def known_arguments(cls: type[DataclassInstance], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that are fields of a config dataclass, as values of the fields' types."""
    known = {field.name: str(field.type) for field in fields(cls)}
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


def check_autoencoder(kind: ConfigKind, config: Mapping[str, Any], class_name: str, model_type: str) -> None:
    """Raise StarflowError if an autoencoder's `config.json` names another class of diffusers or another model type."""
    for key, expected in (("_class_name", class_name), ("model_type", model_type)):
        found = config.get(key, expected)
        kind.require(found == expected, f"{key} is {found!r}; it must be {expected!r}")
