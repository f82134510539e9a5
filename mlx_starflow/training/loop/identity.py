"""What a training must not change between two of its runs: its networks' configs, its data, what it started from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlx_starflow.errors import StarflowError

Identity = Mapping[str, Any]
"""By name: a config, which is a mapping of plain values, a plain value, or a `digest`."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST = 4
"""Differences that are named."""


def digest(*parts: object) -> str:
    """A checksum of arrays and plain values."""
    found = hashlib.sha256()
    for part in parts:
        is_array = isinstance(part, np.ndarray)
        head = [str(part.dtype), *part.shape] if isinstance(part, np.ndarray) else part
        found.update(json.dumps(head, sort_keys=True).encode() + b"\n")
        if is_array:
            found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def plain(identity: Identity) -> dict[str, Any]:
    """An identity as JSON gives it back."""
    return json.loads(json.dumps(identity))


def check_identity(was: Identity, now: Identity, where: str, more: str = "") -> None:
    """Raise StarflowError, naming what differs, unless a checkpoint's identity is that of the run that resumes.

    Args:
        was: the checkpoint's; what it does not know, as it is of an older version, is not compared.
        now: the run's.
        where: names the checkpoint.
        more: a further difference, named after the others.
    """
    changes = [change for name in now if name in was for change in _changes(name, was[name], plain(now)[name])]
    if not changes:
        return
    named = changes[:_MOST] + (["..."] if len(changes) > _MOST else []) + ([more] if more else [])
    raise StarflowError(
        f"{where} is of another run ({', '.join(named)}): go on with what it was begun with, "
        "or give another folder, or --no-resume to start again"
    )


def _changes(name: str, was: Any, now: Any) -> Iterator[str]:
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        # A config leaves out what is a default.
        for key in sorted({*was, *now}):
            yield from _changes(f"{name}: {key}", was.get(key), now.get(key))
    elif any(_DIGEST.fullmatch(str(value)) for value in (was, now)):
        yield f"other {name}"
    else:
        yield f"{name} {_short(was)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = "default" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
