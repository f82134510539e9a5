"""The tensor of a checkpoint, which is read when it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Tensor(NamedTuple):
    """A tensor of a checkpoint: what is known of it, and how to read it."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]
