"""Operations that would keep a GPU busy for seconds, in pieces.

macOS ends the work of a GPU that takes more than some seconds at once (a few reports say five, others ten, and less
while a display is on). MLX hands work over after 40 operations or 40 MB of arrays on most chips, so that what can take
long is a single large operation: a product or an attention over the positions of a whole video.
"""

from __future__ import annotations

import math

from mlx_starflow.kernels.devices import backend

MOST = 1e12
"""Multiplications and additions of one operation: at its peak rate an M1, the slowest chip, computes these in 0.4 s,
and at a third of it in 1.2 s."""


def pieces(count: int, operations: float) -> list[tuple[int, int]]:
    """(start, stop) of the parts of `count` rows that are computed by an operation each, all of them together by so
    many multiplications and additions. Elsewhere than on Metal that is one part, as it mostly is there."""
    parts = max(1, min(count, math.ceil(operations / MOST))) if backend() == "Metal" else 1
    size = -(-count // parts)
    return [(start, min(start + size, count)) for start in range(0, count, size)]
