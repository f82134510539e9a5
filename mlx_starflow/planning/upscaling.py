"""How much memory enlarging pictures takes, and the tiles in which this machine has room for it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_starflow.convert.upscalers import open_upscaler
from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.memory import available, installed
from mlx_starflow.model_dir.weights import automatic_dtype, dtype_name, parameters
from mlx_starflow.models.upscalers import UpscalingNetwork
from mlx_starflow.models.upscalers.network import COLOURS
from mlx_starflow.planning.limits import MOST_SIDE

SIDES = (512, 256, 128, 64, 32)
"""Of tiles, in positions of the feature maps; larger ones are no faster."""

REPORTED = ((256, 256), (512, 512), (848, 480), (1920, 1080))
"""Sizes of pictures, (width, height), that `describe_upscaler` speaks of."""

FRAMES = 8
FRAMES_PIXELS = 2**18
"""Frames of a video that are enlarged together are at most so many, and have at most so many pixels together."""

_RADIUS = 8
"""That tiles are read beyond their edges, at most."""


def upscaling_bytes(
    network: UpscalingNetwork, size: tuple[int, int], *, side: int, batch: int = 1, item: int = 4
) -> int:
    """What enlarging takes at most, weights included: an upper estimate, held against measured peaks by tests.

    Args:
        network: newly made or with its weights.
        size: (width, height) of the pictures.
        side: of the tiles.
        batch: pictures at once.
        item: bytes of a number that the network computes with.
    """
    weights = item * sum(parameter.size for parameter in parameters(network).values())
    width, height = (-(-each // network.unshuffle) for each in size)

    def positions(side: int, radius: int) -> int:
        return min(height, side + 2 * radius) * min(width, side + 2 * radius)

    tile = network.work * positions(side, _RADIUS)
    last = network.pixel_work * positions(network.pixel_side(side), network.pixel_radius)
    maps = network.held * width * height
    area = size[0] * size[1]
    # Pictures as float32, and the result as bytes: in an array, and as an image.
    pictures = 4 * COLOURS * area + 2 * COLOURS * area * network.scale**2
    return weights + batch * (item * (maps + max(tile, last)) + pictures)


def tile_side(network: UpscalingNetwork, size: tuple[int, int], *, batch: int = 1, item: int = 4) -> int:
    """The side of the tiles for which there is memory beside what MLX holds already.

    Where there is not enough for the smallest ones, they are tried as long as the machine has so much in all.

    Raises:
        StarflowError: it has not, or the result would have sides that no image has.
    """
    if max(size) * network.scale > MOST_SIDE:
        raise StarflowError(f"a picture of {size[0]}x{size[1]} is too large to be enlarged by {network.scale}")
    room = available() - mx.get_active_memory()
    needed = 0
    for side in SIDES:
        needed = upscaling_bytes(network, size, side=side, batch=batch, item=item)
        if needed <= room:
            return side
    if needed > installed():
        raise StarflowError(
            f"to enlarge a picture of {size[0]}x{size[1]} by {network.scale} takes {needed / 1e9:,.1f} GB of memory, "
            f"and this machine has {installed() / 1e9:,.1f}: give a smaller one"
        )
    return SIDES[-1]


def describe_upscaler(path: Path) -> tuple[dict[str, str], list[str]]:
    """What a file of an upscaler is, name -> one line of text; and lines about the memory that it takes here.

    Raises StarflowError if it is none.
    """
    file = open_upscaler(path)
    network, dtype = file.network, automatic_dtype()
    weights = sum(parameter.size for parameter in parameters(network).values())
    lines = {
        "file": str(path),
        "upscaler": f"{network.architecture}, {weights / 1e6:.2f} M parameters, enlarges {network.scale} times",
        "sha256": file.digest,
        "computes in": dtype_name(dtype),
    }
    report = ["memory, computed, in MiB:", "picture      " + "".join(f"{f'tiles of {side}':>14}" for side in SIDES)]
    for width, height in REPORTED:
        needed = [upscaling_bytes(network, (width, height), side=side, item=dtype.size) for side in SIDES]
        report.append(f"{f'{width}x{height}':<13}" + "".join(f"{bytes_ / 2**20:>14.0f}" for bytes_ in needed))
    return lines, report


def frames_at_once(network: UpscalingNetwork, size: tuple[int, int], *, item: int = 4) -> int:
    """How many frames of a video are enlarged together: as many small ones as make up a large one, if there is memory
    for them."""
    count = max(1, min(FRAMES, FRAMES_PIXELS // (size[0] * size[1])))
    room = available() - mx.get_active_memory()
    while count > 1 and upscaling_bytes(network, size, side=SIDES[-1], batch=count, item=item) > room:
        count -= 1
    return count
