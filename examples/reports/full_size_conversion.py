"""Memory and time of converting a checkpoint of the full 3B size (15 GB of random float32 weights).

    python examples/reports/full_size_conversion.py SCRATCH [--quantize 8]

Linux only. Writes a checkpoint under the official tensor names into SCRATCH, converts it with `mlx-starflow convert
flow`, and prints the conversion's peak of anonymous memory (what a process holds beside the files that it maps), its
time, and what it wrote. Kills a second conversion on its way and checks that its output does not load, and that a third
one completes it.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import yaml

from mlx_starflow.convert.archive import write_archive
from mlx_starflow.convert.official import ARGUMENTS
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.files import Spec
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.starflow import FlowConfig, STARFlow

NAME = "starflow_3B_t2i_256x256"


def write_random_checkpoint(path: Path, config: FlowConfig) -> None:
    """Random weights of the official names and shapes."""
    layout = {name: Spec(tuple(array.shape), mx.float32) for name, array in parameters(STARFlow(config)).items()}
    # One block of noise, cut to size: drawing four billion numbers would take longer than everything else.
    pool = np.random.default_rng(0).standard_normal(1 << 26, np.float32) * 0.02

    def arrays():
        for name, spec in layout.items():
            yield name, mx.array(np.resize(pool, spec.shape))

    write_archive(path, layout, arrays())


def anonymous_memory(process: int) -> int:
    """Bytes of anonymous memory that a process holds now."""
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def convert(words: list[str], kill_after: float = math.inf) -> tuple[int, float, int]:
    """Run a conversion; returns its exit code, seconds and peak of anonymous memory."""
    began = time.perf_counter()
    peak = 0
    with subprocess.Popen([sys.executable, "-m", "mlx_starflow", "convert", *words]) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            if time.perf_counter() - began > kill_after:
                process.kill()
            time.sleep(0.02)
    return process.returncode, time.perf_counter() - began, peak


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder with 35 GB to spare")
    parser.add_argument("--quantize", help="as in `mlx-starflow convert flow`")
    parser.add_argument("--config", type=Path, help="an official YAML file, for other sizes than the release's")
    args = parser.parse_args(arguments)
    args.scratch.mkdir(parents=True, exist_ok=True)
    print(f"machine: {platform.platform()}, MLX {mx.__version__}")
    checkpoint, out = args.scratch / f"{NAME}.pth", args.scratch / "model"
    # The released YAML does not name the text encoder's width; flan-t5-xl's is 2048.
    arguments = yaml.safe_load(args.config.read_text()) if args.config else {**ARGUMENTS[NAME], "txt_dim": 2048}
    config = FlowConfig.from_official(arguments)
    if not checkpoint.exists():
        write_random_checkpoint(checkpoint, config)
    print(f"{checkpoint.name}: {checkpoint.stat().st_size / 1e9:.2f} GB")

    more = ["--quantize", args.quantize] if args.quantize else []
    more += ["--config", str(args.config)] if args.config else []
    words = ["flow", str(checkpoint), "-o", str(out), *more]
    code, seconds, peak = convert(words)
    print(f"converted: exit code {code}, {seconds:.0f} s, peak anonymous memory {peak / 2**20:.0f} MiB")
    for path in sorted(out.iterdir()):
        print(f"    {path.name:<36} {path.stat().st_size / 1e9:8.3f} GB")
    for path in out.iterdir():
        path.unlink()
    code, _, _ = convert(words, kill_after=seconds / 5)
    try:
        load_flow(out)
        print(f"killed (exit code {code}): LOADS, and must not")
    except StarflowError as error:
        print(f"killed (exit code {code}): {error}")
    code, seconds, peak = convert(words)
    print(f"again: exit code {code}, {seconds:.0f} s, peak anonymous memory {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
