"""The noise an image or a video starts from: the same for a seed on every machine, and portable as a file."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import exists, is_regular, replacing

KEY = "noise"


def draw_seed() -> int:
    """A seed from the operating system, short enough to type."""
    return secrets.randbelow(2**31)


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 `[len(seeds), *shape]`; each sample depends on its own seed alone (NumPy's Philox)."""
    check_seeds(seeds)
    generators = (np.random.Generator(np.random.Philox(seed)) for seed in seeds)
    return np.stack([generator.standard_normal(tuple(shape), np.float32) for generator in generators])


def draw_side_noise(seeds: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """`draw_noise` from another part of each seed's random numbers, far from the one that `draw_noise` uses."""
    check_seeds(seeds)
    generators = (np.random.Generator(np.random.Philox(seed).jumped()) for seed in seeds)
    return np.stack([generator.standard_normal(tuple(shape), np.float32) for generator in generators])


class VideoNoise:
    """What `draw_noise` gives for videos, times `scale`, drawn a few frames at a time: it takes no memory.

    Give the ranges of frames that are wanted in order: `noise[:, 0:5]`, `noise[:, 5:6]`.

    Attributes:
        shape: `[B, before + T, h, w, C]`; the frames `before` those of the noise cannot be asked for.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], *, before: int = 0, scale: float = 1.0):
        """`shape` is `[T, h, w, C]`."""
        check_seeds(seeds)
        self.shape = (len(seeds), before + shape[0], *shape[1:])
        self._generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self._next, self._scale = before, np.float32(scale)

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        frames = key[1]
        if frames.start < self._next:
            raise IndexError(f"frame {frames.start} comes before frame {self._next}")
        drawn = []
        for frame in range(self._next, frames.stop):
            one = [generator.standard_normal(self.shape[2:], np.float32) for generator in self._generators]
            if frame >= frames.start:
                drawn.append(np.stack(one))
        self._next = frames.stop
        return self._scale * np.stack(drawn, axis=1)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise StarflowError if one of them is none; NumPy's integers are seeds too."""
    for seed in seeds:
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise StarflowError(f"a seed is a whole number from 0 on, not {seed}")


def digest(noise: np.ndarray) -> str:
    """Tells two noise arrays apart in an image's metadata."""
    return hashlib.sha256(np.ascontiguousarray(noise, np.float32).tobytes()).hexdigest()


def check_finite_noise(noise: np.ndarray, path: Path) -> None:
    """Raise StarflowError, naming the file that holds it or shall hold it, if it has a NaN or an infinity.

    A number whose square is one counts too: the density of such noise cannot be computed.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(np.square(noise.astype(np.float32))).all()
    if not finite:
        raise StarflowError(f"{path}: the noise is not finite; try a lower guidance, or weights in float32")


def save_noise(noise: np.ndarray, path: Path) -> None:
    """Write noise, `[B, H, W, C]` or of videos `[B, T, H, W, C]`, as safetensors. Raises StarflowError."""
    check_finite_noise(noise, path)
    with replacing(path) as temporary:
        temporary.write_bytes(save({KEY: np.ascontiguousarray(noise, np.float32)}))


def read_noise(path: Path) -> np.ndarray:
    """Read noise that `save_noise` wrote, float32. Raises StarflowError."""
    if exists(path) and not is_regular(path):
        raise StarflowError(f"{path} cannot be read as a noise file: it is not a regular file")
    try:
        arrays = load_file(path)
    except Exception as error:
        raise StarflowError(f"{path} cannot be read as a noise file: {one_line(error)}") from None
    if KEY not in arrays:
        raise StarflowError(f'{path} holds no tensor "{KEY}"; write noise files with --save-noise')
    noise = arrays[KEY]
    if noise.dtype.kind != "f" or noise.ndim < 1:
        raise StarflowError(f"{path} holds no noise: that is real numbers, a sample a row")
    noise = noise.astype(np.float32)
    check_finite_noise(noise, path)
    return noise


def load_noise(path: Path, shape: Sequence[int]) -> np.ndarray:
    """`read_noise` of images, checked to be `shape` `[B, H, W, C]`. Raises StarflowError."""
    noise = read_noise(path)
    if noise.shape != tuple(shape):
        raise StarflowError(f"{path} holds noise of shape {list(noise.shape)}; these pictures need {list(shape)}")
    return noise
