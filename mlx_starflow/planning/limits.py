"""What is refused before any work begins, as the machine has no room for it."""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.planning.class_memory import plan_classes
from mlx_starflow.planning.memory import installed, plan

MOST_SIDE = 1 << 16
"""Pixels of a side; no picture that Pillow writes as JPEG has more."""

MOST_IMAGES = 1_000_000
"""That one call makes, and steps that it takes for one."""


def check_side(size: tuple[int, int]) -> None:
    """Raise StarflowError unless (width, height) are those of an image."""
    if not 1 <= min(size) <= max(size) <= MOST_SIDE:
        raise StarflowError(f"a size has sides of 1 to {MOST_SIDE} pixels, not {_short(size[0])}x{_short(size[1])}")


def check_count(count: int, what: str = "pictures") -> None:
    """Raise StarflowError if that is more than one call makes, or takes."""
    if count > MOST_IMAGES:
        raise StarflowError(f"{_short(count)} {what} are too many: {MOST_IMAGES:,} are the most at a time")


def check_memory(
    model: ModelDirectory,
    size: tuple[int, int] | None,
    *,
    batch: int = 1,
    frames: int | None = None,
    guidance: float | None = None,
    dtype: mx.Dtype | None = None,
    low_memory: bool = False,
    ranks: int = 1,
    held: int = 0,
    quantization: int | str | None = None,
) -> None:
    """Raise StarflowError, with the figure, if images or videos take more memory than the machine has in all.

    What takes more than `memory.available` but no more than there is, is tried: the plan is an upper estimate, and
    some systems make room.

    Args:
        size, batch, frames, guidance, dtype: as `memory.plan` takes them.
        low_memory: one network is in memory at a time.
        ranks: processes that compute the flow together.
        held: bytes of results besides.
        quantization: of the flow, as it is read; None: as stored.
    """
    expected = plan(
        model,
        size=size,
        batch=batch,
        frames=frames,
        guidance=guidance,
        dtype=dtype,
        quantization=quantization,
    ).split(ranks)
    what = f"pictures of {size[0]}x{size[1]}" if size else "this"
    _check(expected.peak(low_memory) + held, what, "take a smaller size, or fewer pictures")


def check_class_memory(
    model: ModelDirectory,
    *,
    batch: int = 1,
    guidance: float | None = None,
    dtype: mx.Dtype | None = None,
    ranks: int = 1,
    quantization: int | str | None = None,
) -> None:
    """`check_memory` of images of classes; arguments as `class_memory.plan_classes` takes them."""
    expected = plan_classes(model, batch=batch, guidance=guidance, dtype=dtype, quantization=quantization).split(ranks)
    _check(expected.peak(), f"{batch:,} pictures at once" if batch > 1 else "this", "make fewer pictures at a time")


def _check(needed: int, what: str, fix: str) -> None:
    if needed > (there := installed()):
        raise StarflowError(
            f"{what} would take {_gigabytes(needed)} GB of memory, and this machine has {_gigabytes(there)}: {fix}"
        )


def check_held(count: int, bytes_each: int, what: str = "pictures") -> None:
    """Raise StarflowError, with the figure, if so many results do not fit into the machine's memory together."""
    if (needed := count * bytes_each) > (there := installed()):
        raise StarflowError(
            f"{count:,} {what} would take {_gigabytes(needed)} GB of memory, and this machine has "
            f"{_gigabytes(there)}: make fewer at a time"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f}" if count < 1e11 else f"{count // 10**9:,}"


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**12 else "a number of many digits"
