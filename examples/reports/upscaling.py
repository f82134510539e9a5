"""Seconds and memory of enlarging one picture, by architecture and by size of the tiles, with random weights.

    python examples/reports/upscaling.py [--size 256] [--tiles 256 128 64 32] [--only SPAN]

The networks have the sizes of the released files, so they cost what those cost. Memory is the most that MLX held,
weights included, and beside it what the plan says. The last column is an estimate for a Mac, not a measurement: the
operations at the peak rate of its GPU, which no program reaches.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow import Upscaler
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.upscalers import SPAN, RRDBNet, SRVGGNet, UpscalingNetwork
from mlx_starflow.planning.chips import find_chips
from mlx_starflow.planning.upscaling import upscaling_bytes

NETWORKS = {
    "RealESRGAN_x4plus": lambda: RRDBNet(64, 32, 23),
    "RealESRGAN_x2plus": lambda: RRDBNet(64, 32, 23, unshuffle=2),
    "RealESRGAN_x4plus_anime_6B": lambda: RRDBNet(64, 32, 6),
    "realesr-general-x4v3": lambda: SRVGGNet(64, 32, 4),
    "realesr-animevideov3": lambda: SRVGGNet(64, 16, 4),
    "spanx4_ch48": lambda: SPAN(48, 4),
}
CHIPS = ("M1", "M3 Max 40-core")


def random_weights(network: UpscalingNetwork) -> dict[str, mx.array]:
    """As a checkpoint has them, in PyTorch's layout."""
    rng = np.random.default_rng(0)
    shapes = {name: tuple(value.shape) for name, value in parameters(network).items()}
    if isinstance(network, SPAN):
        for name in [name for name in shapes if name.startswith(("conv_1.", "conv_2.", "block_"))]:
            path, kind = name.rsplit(".", 1)
            outputs, inputs = shapes[f"{path}.weight"][0], shapes[f"{path}.weight"][-1]
            parts = {"sk": (outputs, 1, 1, inputs), "conv.0": (2 * inputs, 1, 1, inputs)}
            parts |= {"conv.1": (2 * outputs, 3, 3, 2 * inputs), "conv.2": (outputs, 1, 1, 2 * outputs)}
            if kind == "bias":
                del shapes[f"{path}.weight"], shapes[f"{path}.bias"]
                for part, shape in parts.items():
                    shapes |= {f"{path}.{part}.weight": shape, f"{path}.{part}.bias": shape[:1]}
    out = {}
    for name, shape in shapes.items():
        values = mx.array(rng.standard_normal(shape, np.float32) * np.prod(shape[1:] or (100,)) ** -0.5)
        out[name] = mx.contiguous(mx.moveaxis(values, -1, 1)) if values.ndim == 4 else values
    return out


def operations(network: UpscalingNetwork, size: int) -> float:
    """Multiplications and additions for a square picture."""
    positions = (size / network.unshuffle) ** 2
    total = 0.0
    for name, value in parameters(network).items():
        if value.ndim != 4:
            continue
        doublings = 0
        if isinstance(network, RRDBNet) and name.startswith(("conv_up", "conv_hr", "conv_last")):
            doublings = int(name[7]) if name.startswith("conv_up") else network.doublings
        total += 2 * value.size * positions * 4**doublings
    return total


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side of the picture")
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 128, 64, 32], help="sides of the tiles")
    parser.add_argument("--only", default="", help="networks with this in their names")
    args = parser.parse_args(arguments)
    print(f"machine: {platform.platform()}, MLX {mx.__version__} on the {mx.default_device().type.name}")
    chips = [find_chips(name)[0] for name in CHIPS]
    macs = ", ".join(chip.name for chip in chips)
    print(f"| network | weights | tile | s | peak MiB | planned MiB | estimate for {macs}, s |")
    print("|---|---|---|---|---|---|---|")
    picture = np.random.default_rng(0).integers(0, 256, (args.size, args.size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in NETWORKS.items():
            if args.only not in name:
                continue
            network = make()
            path = Path(folder) / f"{name}.safetensors"
            mx.save_safetensors(str(path), random_weights(network))
            upscaler = Upscaler.load(path)
            weights = sum(value.size for value in parameters(network).values())
            needed = operations(network, args.size)
            estimates = ", ".join(f"{chip.seconds(0, needed):.2f}" for chip in chips)
            for tile in args.tiles:
                mx.clear_cache()
                mx.reset_peak_memory()
                began = time.perf_counter()
                upscaler(picture, tile=tile)
                seconds = time.perf_counter() - began
                planned = upscaling_bytes(network, (args.size, args.size), side=tile, item=upscaler.dtype.size)
                print(
                    f"| {name} | {weights / 1e6:.2f} M | {tile} | {seconds:.1f} | {mx.get_peak_memory() / 2**20:.0f} | "
                    f"{planned / 2**20:.0f} | {estimates} |",
                    flush=True,
                )
            del upscaler
            path.unlink()


if __name__ == "__main__":
    main()
