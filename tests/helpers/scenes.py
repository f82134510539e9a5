"""Sprites for the scripts that draw scenes, so that no test has to fetch the real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from helpers.paths import EXAMPLES


def write_sprites(folder: Path, colour: tuple[int, int, int] | None = None) -> Path:
    """A data folder with a disc for every object: of this colour, or each of another one."""
    sys.path.insert(0, str(EXAMPLES))
    from scene_words import objects

    side = 24
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    rng = np.random.default_rng(0)
    colours = np.array([colour or rng.integers(256, size=3) for _ in objects()], np.uint8)
    sprites = np.zeros((len(colours), side, side, 4), np.uint8)
    sprites[..., :3] = colours[:, None, None]
    sprites[..., 3] = 255 * (np.hypot(x, y) < side / 2)
    np.savez(folder / "sprites.npz", names=np.array(list(objects())), sprites=sprites)
    return folder
