"""The golden cases of tests/data as complete folders, their weights drawn anew from PyTorch's random numbers.

The weights of a golden case are random draws of PyTorch, hence a few kilobytes say all about megabytes of them. Beside
a case's small files lie `<file>.json`, which names the seed and says which bytes of the file are which draws, and
`<file>.rest`, all other bytes (names, offsets, checksums, masks, small tensors) compressed by zlib. `golden_case` puts
them together: the files are those that PyTorch and safetensors wrote, byte for byte, and SHA-256 vouches for it. The
generator is worth its lines because a few kilobytes stand for 46 MB of files that every clone would carry.

The draws follow PyTorch's CPU code: the Mersenne twister, 24 bits of each number for a uniform one, and for normal ones
Box and Muller's transform of blocks of 16 with the single-precision logarithm, sine and cosine of Cephes
(https://www.netlib.org/cephes). Only operations that IEEE 754 rounds correctly are used here (no logarithm or sine of
the system), so that every machine gets the same bits.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from helpers.paths import DATA

_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
# Cephes' parts of pi / 4 (negated) and of log 2.
_QUARTER = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)
_LOG2 = (-2.12194440e-4, 0.693359375)

f32 = np.float32


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="golden-")


@cache
def golden_case(case: str) -> Path:
    """A folder with all files of tests/data/<case>, made once and removed when Python ends.

    ValueError if a file that was put together is not the original, which its SHA-256 tells.
    """
    out = Path(_folder().name) / case
    out.mkdir(parents=True, exist_ok=True)
    for path in (DATA / case).iterdir():
        if path.suffix == ".rest":
            (out / path.stem).write_bytes(rebuild(path))
        elif not path.with_suffix(".rest").exists():
            shutil.copyfile(path, out / path.name)
    return out


def rebuild(path: Path) -> bytes:
    """The file `<file>`, given `<file>.rest`."""
    recipe = json.loads(path.with_suffix(".json").read_text())
    rest = memoryview(zlib.decompress(path.read_bytes()))
    twister = np.random.MT19937()
    twister._legacy_seeding(recipe["seed"])
    numbers = twister.random_raw(recipe["numbers"]).astype(np.uint32)
    file = bytearray()
    for start, kind, first, size, steps in recipe["draws"]:
        gap = start - len(file)
        file += rest[:gap]
        rest = rest[gap:]
        if kind == "normal":
            values = normal(numbers[first : first + size + (16 if size % 16 else 0)], size)
        else:
            values = uniform(numbers[first : first + size])
        for operator, operand in steps:
            values = _STEPS[operator](values, f32(operand))
        file += values.astype("<f4").tobytes()
    file += rest
    if sha256(file).hexdigest() != recipe["sha256"]:
        raise ValueError(f"{path.with_suffix('')} cannot be put together on this machine: its SHA-256 is another one")
    return bytes(file)


def uniform(numbers: np.ndarray) -> np.ndarray:
    """`torch.rand(size)` of 32-bit random numbers [size]."""
    return (numbers & 0xFFFFFF).astype(f32) * f32(2**-24)


def normal(numbers: np.ndarray, size: int) -> np.ndarray:
    """`torch.randn(size)`, size >= 16, of 32-bit random numbers [size].

    If 16 does not divide the size, PyTorch draws the last 16 values anew: then there are 16 numbers more.
    """
    uniforms = uniform(numbers)
    values = _box_muller(uniforms[: size - size % 16])
    if size % 16:
        values = np.concatenate([values[: size - 16], _box_muller(uniforms[size:])])
    return values


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Blocks of 8 radii and 8 angles to as many normal numbers."""
    pairs = uniforms.reshape(-1, 2, 8)
    radius = np.sqrt(f32(-2) * _log(f32(1) - pairs[:, 0]))
    sin, cos = _sin_cos(f32(2 * np.pi) * pairs[:, 1])
    # PyTorch adds the mean, 0, which makes -0 of the radius -0 to 0.
    return np.stack([radius * cos, radius * sin], axis=1).reshape(-1) + f32(0)


def _fma(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
    """a * b + c, rounded once: a product of two float32 is exact in float64."""
    return (a.astype(np.float64) * np.float64(f32(b)) + np.float64(f32(c))).astype(f32)


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, coefficients[0])
    for each in coefficients[1:]:
        y = _fma(y, x, each)
    return y


def _log(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.int32)
    exponent = ((bits >> 23) - 126).astype(f32)
    x = ((bits & 0x7FFFFF) | 0x3F000000).view(f32)
    small = x < f32(0.5**0.5)
    exponent = exponent - small.astype(f32)
    x = x - f32(1) + np.where(small, x, f32(0))
    z = x * x
    y = _fma(_polynomial(_LOG, x) * x, z, exponent * f32(_LOG2[0]))
    return _fma(exponent, _LOG2[1], x + _fma(z, -0.5, y))


def _sin_cos(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of x >= 0."""
    octant = ((x * f32(4 / np.pi)).astype(np.int32) + 1) & ~1
    quarters = octant.astype(f32)
    for part in _QUARTER:
        x = _fma(quarters, part, x)
    z = x * x
    cos = _fma(_polynomial(_COS, z) * z, z, -(z * f32(0.5))) + f32(1)
    sin = _fma(_polynomial(_SIN, z) * z, x, x)
    swap = octant & 2 != 0
    sin, cos = np.where(swap, cos, sin), np.where(swap, sin, cos)
    return np.where(octant & 4 != 0, -sin, sin), np.where((octant + 2) & 4 != 0, -cos, cos)


_STEPS = {
    "/": lambda values, operand: values / operand,
    "*": lambda values, operand: values * operand,
    "+": lambda values, operand: values + operand,
    # Uniform between -operand and operand.
    "+-": lambda values, operand: _fma(values, 2 * operand, -operand),
}
