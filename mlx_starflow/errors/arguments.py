"""What public functions are called with, checked: of a wrong name or type a StarflowError says what is expected."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mlx_starflow.errors import StarflowError, printable

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type[Any])

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("True or False", "truth values"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
}
"""What a type is called, one and several."""


def call_type(hint: Any, one: str, many: str) -> None:
    """Give a type, such as a union with a meaning of its own, words for messages: for one value, and for several."""
    _WORDS[hint] = one, many


_COUNTS = ("no", "one", "two", "three", "four")


def checked(function: Function) -> Function:
    """A function, or a method, whose callers are told of their mistakes: its signature and its docstring stay.

    Raises:
        StarflowError: when it is called with an argument that it does not have (it names one that is spelled like it),
            without one that it needs, or with a value of another type than it says.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        _check(function, signature, args, options)
        return function(*args, **options)

    return cast(Function, call)


def checked_class(cls: Class) -> Class:
    """The same for a dataclass whose constructor is called."""
    made, signature = cls.__init__, inspect.signature(cls)

    @wraps(made)
    def initialize(self: Any, *args: Any, **options: Any) -> None:
        _check(cls, signature, args, options)
        made(self, *args, **options)

    cls.__init__ = initialize
    return cls


def _check(function: Callable[..., Any], signature: inspect.Signature, args: Sequence[Any], options: Any) -> None:
    name, known = function.__name__, signature.parameters
    for option in options:
        if option not in known:
            kind = "field" if isinstance(function, type) else "argument"
            raise StarflowError(f"{name} has no {kind} {_named(option, signature)}")
    try:
        given = signature.bind(*args, **options).arguments
    except TypeError:
        raise StarflowError(f"{name}: {_misfit(signature, args, options)}") from None
    hints = _hints(function)
    for parameter, value in given.items():
        if (hint := hints.get(parameter)) is not None and not _fits(value, hint):
            raise StarflowError(f"{name}: {parameter} must be {_expected(hint)}, not {_shown(value)}")


def _named(option: str, signature: inspect.Signature) -> str:
    """An unknown argument, and the one that was probably meant."""
    names = [name for name in signature.parameters if name != "self"]
    near = get_close_matches(option, names, 1, 0.6) or [name for name in names if option in name or name in option]
    advice = f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"
    return f"{printable(option)[:50]!r}{advice}"


def _misfit(signature: inspect.Signature, args: Sequence[Any], options: Mapping[str, Any]) -> str:
    """Why arguments with known names do not fit a signature."""
    positional = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if len(args) > len(positional):
        named = [name for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
        own = [p.name for p in positional if p.name != "self"]
        example = f", such as {named[0]}=..." if named else ""
        return f"only {', '.join(own) or 'nothing'} can be given without a name; the others need theirs{example}"
    for parameter in positional[: len(args)]:
        if parameter.name in options:
            return f"{parameter.name} is given twice"
    missing = [
        p.name
        for p in [*positional[len(args) :], *(p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY)]
        if p.default is p.empty and p.name not in options
    ]
    return f"{' and '.join(missing)} must be given"


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


# ---- values and types


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as that can be told without reading what it yields."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar | str) or hint is inspect.Parameter.empty:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(value is each or (isinstance(value, type(each)) and value == each) for each in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or _scalar(value, "b")
    if hint is int:
        return _scalar(value, "iu") or (isinstance(value, Integral) and not isinstance(value, bool))
    if hint is float:
        return _scalar(value, "iuf") or (isinstance(value, Real) and not isinstance(value, bool))
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Iterable):
        return _fits_many(value, origin, inner)
    if origin is not None:
        hint = origin
    if getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False):
        return True
    try:
        return isinstance(value, hint)
    except TypeError:
        return True


def _fits_many(value: Any, origin: type, inner: tuple[Any, ...]) -> bool:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        return False
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if issubclass(origin, Sequence) and not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return False
    if isinstance(value, Mapping | set | frozenset) and issubclass(origin, Sequence):
        return False
    return not isinstance(value, list | tuple) or not inner or all(_fits(each, inner[0]) for each in value)


def _scalar(value: Any, kinds: str) -> bool:
    """Whether it is a number of NumPy's of these kinds."""
    return getattr(value, "shape", None) == () and getattr(getattr(value, "dtype", None), "kind", "") in kinds


def _expected(hint: Any) -> str:
    """Words for a type."""
    if hint in _WORDS:
        return _WORDS[hint][0]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if str in options and Path in options:
        options = tuple(each for each in options if each is not str)
    said = list(dict.fromkeys(filter(None, map(_called, options))))
    return " or ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


def _called(hint: Any, many: bool = False) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is None or hint is type(None):
        return ""
    if hint in _WORDS:
        return _WORDS[hint][many]
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        if len(set(inner)) == 1:
            return f"{_COUNTS[len(inner)] if len(inner) < len(_COUNTS) else len(inner)} {_called(inner[0], True)}"
        return f"({', '.join(map(_expected, inner))})"
    if inspect.isfunction(hint) or (origin or hint) is Callable or getattr(origin, "__name__", "") == "Callable":
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list of {_several(inner[0])}" if inner else "a list"
    return _class_words(hint if origin is None else origin, many)


def _several(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType) and hint not in _WORDS:
        return " or ".join(dict.fromkeys(filter(None, (_called(each, True) for each in get_args(hint)))))
    return _called(hint, True)


def _class_words(hint: Any, many: bool) -> str:
    module, name = getattr(hint, "__module__", ""), getattr(hint, "__name__", str(hint))
    known = {"PIL": "PIL image", "numpy": "NumPy array", "mlx": "MLX array"}
    words = known.get(module.partition(".")[0], name) if name in ("Image", "ndarray", "array") else name
    if many:
        return f"{words}s"
    return f"{'an' if words[0] in 'AEIOUaeio' or words.startswith('MLX') else 'a'} {words}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str | int | float | list | tuple):
        text = printable(repr(value))
        return text if len(text) <= 60 else f"{text[:57]}..."
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{_class_words(type(value), False)} of shape {list(shape)}"
    return _class_words(type(value), False)
