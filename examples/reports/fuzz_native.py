"""Random flow blocks through the C++ network, compiled with AddressSanitizer: how often does it touch foreign memory?

    python examples/reports/fuzz_native.py [--configs 600] [--seed 0]

Each configuration is consistent, as the config classes demand, and otherwise random: widths, heads, layers, norms,
quantization, text, batch sizes, lengths, and how the tokens are cut into steps. Needs Linux, g++ and its libasan. The
blocks run in a worker process; where the sanitizer ends it, that is a report, and another worker takes up the next
block. Outputs are compared with MLX's, too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TOLERANCE = 1e-3
"""Largest difference from MLX's outputs, in units of the largest output."""


def draw_block(rng: np.random.Generator) -> tuple[dict[str, object], dict[str, int]]:
    """A block's config, and how it is run: batch, length, prefix and bits (0: not quantized)."""
    kv_heads = int(rng.integers(1, 4))
    bits = int(rng.choice([0, 0, 4, 6, 8]))
    width = int(rng.integers(1, 6)) * 32 if bits else int(rng.integers(1, 130))
    config = {
        "in_channels": int(rng.integers(1, 20)),
        "channels": width,
        "num_layers": int(rng.integers(1, 4)),
        "head_dim": int(rng.integers(1, 4)) * 32 if bits else int(rng.integers(1, 6)) * 16,
        "num_heads": kv_heads * int(rng.integers(1, 4)),
        "num_kv_heads": kv_heads,
        "expansion": int(rng.integers(1, 5)),
        "norm_type": str(rng.choice(["layer_norm", "rms_norm"])),
        **{
            name: bool(rng.integers(2))
            for name in ("use_bias", "use_swiglu", "use_qk_norm", "use_post_norm", "use_final_norm", "hf_style_rope")
        },
        "sos": bool(rng.integers(2)),
        "txt_dim": width if rng.integers(2) else 0,
        "use_proj_txt": bool(rng.integers(2)),
    }
    run = {"batch": int(rng.integers(1, 4)), "length": int(rng.integers(1, 90)), "prefix": int(rng.integers(1, 40))}
    return config, {**run, "bits": bits}


def run_block(number: int, seed: int) -> float:
    """One block in C++ and in MLX; the largest difference of their outputs."""
    import mlx.core as mx

    from mlx_starflow import cpu
    from mlx_starflow.model_dir.quantization import quantize_module
    from mlx_starflow.models.flow import BlockConfig, FlowBlock
    from mlx_starflow.models.rope import line_frequencies
    from mlx_starflow.sampling.network import CompiledNetwork

    rng = np.random.default_rng([seed, number])
    mx.random.seed(number)
    values, run = draw_block(rng)
    block = FlowBlock(BlockConfig(**values))
    block.proj_out.weight = 0.1 * mx.random.normal(block.proj_out.weight.shape)
    if run["bits"]:
        quantize_module(block, run["bits"], group_size=32)
    batch, length = run["batch"], run["length"]
    text = mx.random.normal((batch, run["prefix"], values["txt_dim"])) if values["txt_dim"] else None
    positions = length + (run["prefix"] if text is not None else 0)
    rope = line_frequencies(values["head_dim"], positions) if rng.integers(4) else None
    arguments = (block, batch, length, rope, block.condition(text, batch), float(rng.uniform(0.5, 2)))
    native, plain = cpu.fast_network(*arguments), CompiledNetwork(*arguments)
    if native is None:
        raise SystemExit(f"configuration {number} does not run in C++: {values}")
    x = mx.random.normal((batch, length, values["in_channels"]))
    worst, start = 0.0, 0
    while start < length:
        stop = min(start + int(rng.choice([1, 1, 2, 5, 33])), length)
        actual, expected = (np.array(each(x[:, start:stop])) for each in (native, plain))
        worst = max(worst, float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1)))
        back = int(rng.integers(0, stop - start)) if rng.integers(4) == 0 else 0
        for each in (native, plain):
            each.trim(back)
        start = stop - back
    return worst


def work(first: int, stop: int, seed: int) -> None:
    """Run some blocks, in a process that has the sanitizer."""
    import mlx.core as mx

    from mlx_starflow.cpu import library

    os.environ.pop("LD_PRELOAD", None)  # it is loaded here; the compiler does not need it
    mx.disable_compile()  # MLX would compile operations for every block
    # Optimized further, the instrumented code takes six times as long to compile.
    library.COMPILE = (*library.COMPILE, "-O1", "-fsanitize=address", "-g")
    if library.load() is None:
        raise SystemExit("the C++ network cannot be compiled with -fsanitize=address")
    for number in range(first, stop):
        print(number, run_block(number, seed), flush=True)


def sanitized() -> dict[str, str]:
    """The environment of such a process. Raises SystemExit where g++ or its sanitizer is missing."""
    try:
        found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit("this needs Linux and g++") from error
    path = found.stdout.strip()
    if not Path(path).is_file():
        raise SystemExit("g++ has no libasan here: install it (libasan8, gcc-sanitizer)")
    # The worker's threads and Python's own objects outlive it: that is no leak of the network's.
    options = "detect_leaks=0:verify_asan_link_order=0:halt_on_error=1:abort_on_error=0:exitcode=66"
    return {**os.environ, "LD_PRELOAD": path, "ASAN_OPTIONS": options}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the C++ network under AddressSanitizer.")
    parser.add_argument("--configs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options.seed)
        return
    reports, worst, next_one = [], 0.0, 0
    with tempfile.TemporaryDirectory() as cache:
        environment = {**sanitized(), "XDG_CACHE_HOME": cache}
        while next_one < options.configs:
            command = [sys.executable, __file__, "--seed", str(options.seed)]
            command += ["--work", str(next_one), str(options.configs)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            for line in done.stdout.splitlines():
                number, error = line.split()
                next_one, worst = int(number) + 1, max(worst, float(error))
            if done.returncode == 0:
                break
            if "AddressSanitizer" not in done.stderr:
                raise SystemExit(f"configuration {next_one}: {done.stderr[-3000:]}")
            print(f"configuration {next_one}: {draw_block(np.random.default_rng([options.seed, next_one]))}")
            print(done.stderr[:3000])
            reports.append(next_one)
            next_one += 1
    print(f"{options.configs} configurations: {len(reports)} reports of AddressSanitizer; ", end="")
    print(f"largest difference from MLX {worst:.1e}")
    if reports or worst > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
