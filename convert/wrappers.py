"""The dictionaries of a training's checkpoint: under which keys the model's weights stand, and which are averages."""

from __future__ import annotations

import re
from collections.abc import Iterable

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys of the weights as they were at the end, beside an optimizer's, a step counter and the like."""

_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|shadow|averaged?)(?:\d*)(?:[._]|$)", re.IGNORECASE)


def is_average(name: str) -> bool:
    """Whether a key, or the beginning of a tensor's name, is one of averaged weights: "ema", "model_ema.", "swa"."""
    return _AVERAGE.search(name) is not None


def choose_wrapper(keys: Iterable[str], ema: bool) -> str:
    """Which of the keys that have weights behind them is the model's; "" if none is.

    Args:
        keys: of a checkpoint's outermost dictionary.
        ema: the averaged weights, if there are some.
    """
    known = list(keys)
    own = [key for key in WRAPPERS if key in known]
    averages = [key for key in known if is_average(key)]
    order = [*averages, *own] if ema else [*own, *averages]
    return order[0] if order else ""
