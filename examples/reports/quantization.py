"""What each way to quantize a flow saves and costs, in bytes and in exact likelihood.

    python examples/train_scenes.py data/scenes runs/scenes --export --dense
    python examples/scene_data.py data/scenes --pictures data/pictures
    python examples/reports/quantization.py runs/scenes/dense data/pictures

Start from dense weights: those of a model that is quantized already are compared with themselves. The change is
paired: every model sees the same noise.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import mlx.core as mx

from mlx_starflow import load
from mlx_starflow.likelihood.quantization_cost import CaptionedData, Comparison, measure
from mlx_starflow.model_dir.quantization import QUANTIZATIONS
from mlx_starflow.model_dir.requantize import quantize_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or demo")
    parser.add_argument("pictures", type=Path, help="a folder of pictures with a metadata.jsonl")
    parser.add_argument("--limit", type=int, default=64, help="pictures to measure")
    parser.add_argument("--draws", type=int, default=4, help="of the noise, a picture")
    parser.add_argument("--only", nargs="+", choices=QUANTIZATIONS, default=list(QUANTIZATIONS), metavar="Q")
    args = parser.parse_args(arguments)
    print(f"machine: {platform.platform()}, {platform.processor() or platform.machine()}, MLX {mx.__version__}")
    pipe = load(args.model, low_memory=True)
    data = CaptionedData.read(pipe, args.pictures, args.limit)
    original = measure(pipe, data, draws=args.draws)
    print(f"{args.model}: {original.nll}, {args.draws} draws of the noise each")
    mib = original.flow_bytes / 2**20
    print(f"{'flow':<10}{'MiB':>9}{'change of the NLL':>30}   {'block by block, then prior'}")
    print(f"{'as it is':<10}{mib:9.2f}")
    for how in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            smaller = load(quantize_model(args.model, Path(scratch) / how, how), low_memory=True)
            comparison = Comparison(original, measure(smaller, data, draws=args.draws))
        change, mib = comparison.change, comparison.quantized.flow_bytes / 2**20
        parts = " ".join(f"{value:+.5f}" for value in [*change.blocks.mean(axis=0), change.prior.mean()])
        total = f"{change.mean:+.6f} +- {change.standard_error:.6f}"
        print(f"{how:<10}{mib:9.2f}{total:>30}   {parts}", flush=True)


if __name__ == "__main__":
    main()
