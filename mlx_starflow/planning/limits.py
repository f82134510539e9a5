"""What is refused before any work begins, as the machine has no room for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.memory import available, installed
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.models.flow import BlockConfig
from mlx_starflow.planning.class_memory import class_blocks, plan_classes
from mlx_starflow.planning.memory import ModelConfigs, plan
from mlx_starflow.sampling.cache import KV_BITS, KVBits, can_quantize

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


@dataclass(frozen=True)
class MemoryRequest:
    """Images or videos, and how they are to be made.

    Attributes:
        model: the model's directory.
        size, batch, frames, guidance, dtype: as `memory.plan` takes them.
        low_memory: one network is in memory at a time.
        ranks: processes that compute the flow together.
        held: bytes of results besides.
        quantization: of the flow, as it is read; None: as stored.
    """

    model: ModelDirectory
    size: tuple[int, int] | None
    batch: int = 1
    frames: int | None = None
    guidance: float | None = None
    dtype: mx.Dtype | None = None
    low_memory: bool = False
    ranks: int = 1
    held: int = 0
    quantization: int | str | None = None

    @property
    def blocks(self) -> Sequence[BlockConfig]:
        """The flow's."""
        return ModelConfigs.read(self.model).flow.blocks

    def peak(self, kv_bits: KVBits) -> int:
        """Bytes that it takes in all, with keys and values in so many bits. Raises StarflowError as `plan` does."""
        expected = plan(
            self.model,
            size=self.size,
            batch=self.batch,
            frames=self.frames,
            guidance=self.guidance,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_bits=kv_bits,
        )
        return expected.split(self.ranks).peak(self.low_memory) + self.held

    def words(self) -> tuple[str, str]:
        """What it is, and what to do where there is too little memory."""
        what = f"pictures of {self.size[0]}x{self.size[1]}" if self.size else "this"
        return what, "take a smaller size, or fewer pictures"


@dataclass(frozen=True)
class ClassRequest:
    """Images of classes; attributes as `class_memory.plan_classes` takes them, and `ranks` as of `MemoryRequest`."""

    model: ModelDirectory
    batch: int = 1
    guidance: float | None = None
    dtype: mx.Dtype | None = None
    ranks: int = 1
    quantization: int | str | None = None

    @property
    def blocks(self) -> Sequence[BlockConfig]:
        return class_blocks(self.model)

    def peak(self, kv_bits: KVBits) -> int:
        expected = plan_classes(
            self.model,
            batch=self.batch,
            guidance=self.guidance,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_bits=kv_bits,
        )
        return expected.split(self.ranks).peak()

    def words(self) -> tuple[str, str]:
        return f"{self.batch:,} pictures at once" if self.batch > 1 else "this", "make fewer pictures at a time"


def check_memory(request: MemoryRequest | ClassRequest, kv_bits: KVBits = 0) -> None:
    """Raise StarflowError, with the figure, if images or videos take more memory than the machine has in all.

    What takes more than `memory.available` but no more than there is, is tried: the plan is an upper estimate, and
    some systems make room.
    """
    needed, there = request.peak(kv_bits), installed()
    if needed > there:
        what, fix = request.words()
        raise StarflowError(
            f"{what} would take {_gigabytes(needed)} GB of memory, and this machine has {_gigabytes(there)}: {fix}"
        )


def automatic_kv_bits(request: MemoryRequest | ClassRequest) -> KVBits:
    """Of keys and values, the most bits that this machine's networks have memory for; 0: as they are computed.

    Where there is none for any, they have as many as still help.
    """
    peaks: dict[KVBits, int] = {}
    for bits in KV_BITS if can_quantize(request.blocks) else KV_BITS[:1]:
        peaks[bits] = request.peak(bits)
        if peaks[bits] <= available():
            return bits
    return min(peaks, key=lambda bits: peaks[bits])


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
