"""The noise a picture starts from: the same for a seed on every machine, and portable as a file."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from mlx_starflow.errors import StarflowError
from mlx_starflow.files import replacing

KEY = "noise"


def draw_seed() -> int:
    """A seed from the operating system, short enough to type."""
    return secrets.randbelow(2**31)


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 `[len(seeds), *shape]`; each sample depends on its own seed alone (NumPy's Philox)."""
    for seed in seeds:
        if seed < 0:
            raise StarflowError(f"a seed is a whole number from 0 on, not {seed}")
    generators = (np.random.Generator(np.random.Philox(seed)) for seed in seeds)
    return np.stack([generator.standard_normal(tuple(shape), np.float32) for generator in generators])


def digest(noise: np.ndarray) -> str:
    """Tells two noise arrays apart in a picture's metadata."""
    return hashlib.sha256(np.ascontiguousarray(noise, np.float32).tobytes()).hexdigest()


def save_noise(noise: np.ndarray, path: Path) -> None:
    """Write `[B, H, W, C]` noise as safetensors. Raises StarflowError."""
    with replacing(path) as temporary:
        temporary.write_bytes(save({KEY: np.ascontiguousarray(noise, np.float32)}))


def load_noise(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Read noise that `save_noise` wrote and check that it is `shape` `[B, H, W, C]`. Raises StarflowError."""
    try:
        arrays = load_file(path)
    except Exception as error:
        raise StarflowError(f"{path} cannot be read as a noise file: {error}") from None
    if KEY not in arrays:
        raise StarflowError(f'{path} holds no tensor "{KEY}"; write noise files with --save-noise')
    noise = arrays[KEY]
    if noise.shape != tuple(shape):
        raise StarflowError(f"{path} holds noise of shape {list(noise.shape)}; these pictures need {list(shape)}")
    return noise.astype(np.float32)
