"""What one GPU does with the released model's sizes, in six minutes: tests on it, then speed.

    python examples/reports/gpu.py                      # CUDA or Metal, about 16 GB; beside PyTorch 24 GB
    python examples/reports/gpu.py --minutes 3 --no-tests
    python examples/reports/gpu.py --small              # a flow of 64 tokens, on anything

From a checkout it first runs the comparisons with PyTorch in float32, if there is CUDA, and the tests of what users do
on MLX's GPU. Then the architecture of the released image model, with random weights in the precision that `--dtype
auto` chooses, is timed: evaluations by the width of a window, beside the time that reading the weights once takes; the
official algorithm and the reference in PyTorch, if it is there, in bfloat16; and this code, dense and in 4 bits. Each
line is printed as soon as it is known, and nothing is written, so that it can be stopped at any time. What there is no
time left for is left out, and says so.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.bench.doctor.speed import WIDTHS, bandwidth, best
from mlx_starflow.bench.trials import Task
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.weights import automatic_dtype, cast_weights, device, dtype_name, parameters
from mlx_starflow.models.flow import products_in
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.planning.memory import ModelConfigs
from mlx_starflow.planning.traffic import evaluation_bytes
from mlx_starflow.sampling import Certificate, GuidedFlow, SamplingOptions

ROOT = Path(__file__).resolve().parents[2]
GUIDANCE = 2.5
PARITY = ["-m", "torch", "-k", "cuda", "tests/parity"]
USERS = [f"tests/{room}" for room in ("pipelines", "sampling", "likelihood", "editing", "kernels", "model_dir")]

SHARE = 0.3
"""Of the time that is left, for each of the two runs of tests."""


class OutOfTimeError(Exception):
    """What was computed took more than its time."""


class Clock:
    """The time that there is."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Raise OutOfTimeError in this block when the time is up."""

        def stop(number: int, frame: FrameType | None) -> None:
            raise OutOfTimeError

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def say(line: str) -> None:
    print(line, flush=True)


def has_cuda_torch() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


# ---- tests


def run_tests(name: str, words: list[str], seconds: float) -> None:
    """Run pytest in as many processes as there are CPUs, at most eight, and print its last line and what failed."""
    workers = str(min(os.cpu_count() or 1, 8))
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", *words]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            printed = f"{process.communicate()[0]}\nstopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            process.terminate()
            raise
    lines = printed.strip().splitlines() or ["nothing was printed"]
    for line in lines[:-1]:
        if line.startswith(("FAILED", "ERROR")):
            say(f"  {line}")
    say(f"{name}: {lines[-1].strip('= ')}")


# ---- the flow


def make_flow(small: bool) -> STARFlow:
    """The released image model's architecture, or a small one like it, with small last layers, so that it does not blow
    up what it reads."""
    config = ModelConfigs.of_release("apple/starflow").flow
    if small:
        config = replace(config, img_size=8, channels=64, layers_per_block=[2, 2, 4], txt_size=8, txt_dim=32)
        config = FlowConfig.from_dict(config.to_dict())
    mx.random.seed(0)
    flow = STARFlow(config)
    for block in flow.blocks:
        block.proj_out.weight = 0.4 * block.config.channels**-0.5 * mx.random.normal(block.proj_out.weight.shape)
    return flow


def evaluated(flow: STARFlow, dtype: mx.Dtype) -> STARFlow:
    cast_weights(flow, dtype)
    mx.eval(flow.parameters())
    return flow


def task(flow: STARFlow, side: int) -> Task:
    """One picture of side x side tokens."""
    config = flow.config
    z = mx.array(draw_noise([0], (side, side, config.channel_size)))
    text = mx.array(draw_noise([100, 101], (config.txt_size, config.txt_dim)))
    return Task(flow, z, text[:1], text[1:], GUIDANCE)


# ---- speed


def widths(flow: STARFlow, speed: float) -> None:
    """Milliseconds of an evaluation of the deep and of a shallow block, by the number of tokens."""
    one = task(flow, flow.config.img_size)
    guided = GuidedFlow(flow, one.z.shape, one.text, one.null_text, SamplingOptions(GUIDANCE))
    columns = [width for width in WIDTHS if width <= one.length]
    say("\n| block | rows | weights once, ms | " + " | ".join(map(str, columns)) + " |")
    say("|---" * (3 + len(columns)) + "|")
    for name, index in (("deep", len(flow.blocks) - 1), ("shallow", 0)):
        rows = one.rows()[index]
        network = guided.decoder(index, 1, one.length).network
        tokens = mx.random.normal((rows, one.length, flow.blocks[index].config.in_channels), key=mx.random.key(0))
        mx.eval(tokens)

        def evaluate(count: int, network: Any = network, tokens: mx.array = tokens) -> None:
            mx.eval(network(tokens[:, :count]))
            network.trim(count)

        cells = [f"{1e3 * best(partial(evaluate, width)):.2f}" for width in columns]
        once = 1e3 * evaluation_bytes(flow.blocks[index]) / speed
        say(f"| {name} | {rows} | {once:.2f} | " + " | ".join(cells) + " |")


def worded(certificate: Certificate) -> str:
    return f"{certificate.max:.1e}, {certificate.rms:.1e}"


Run = Callable[[], tuple[Any, list[int]]]


def timed(name: str, run: Run, clock: Clock, certify: Callable[[Any], Certificate] | None = None) -> None:
    """Print one row of the table: seconds, network evaluations, milliseconds of one, certificate."""
    if clock.left < 1:
        say(f"| {name} | no time left | | | |")
        return
    start = time.perf_counter()
    try:
        with clock.limit():
            x, evaluations = run()
            if isinstance(x, mx.array):
                mx.eval(x)
            seconds = time.perf_counter() - start
            certificate = "" if certify is None else worded(certify(x))
    except OutOfTimeError:
        say(f"| {name} | not within {time.perf_counter() - start:.0f} | | | |")
        return
    except StarflowError as error:
        say(f"| {name} | {error} | | | |")
        return
    total = sum(evaluations)
    counts = " + ".join(map(str, evaluations))
    say(f"| {name} | {seconds:.3g} | {counts} = {total} | {1e3 * seconds / total:.2f} | {certificate} |")


def sides(flow: STARFlow) -> tuple[int, int]:
    """Of what is sampled token by token, a quarter of the tokens, and of everything else."""
    return flow.config.img_size // 2, flow.config.img_size


def own_rows(name: str, flow: STARFlow, clock: Clock) -> None:
    few, all_of_them = (task(flow, side) for side in sides(flow))
    for method, of in (("jacobi", all_of_them), ("rolling", all_of_them), ("sequential", few)):
        label = {"jacobi": "blocks", "rolling": "window"}.get(method, method)
        timed(f"{name}, {label}, {of.length} tokens", partial(of.sample, method), clock, of.certify)


def torch_rows(flow: STARFlow, clock: Clock, where: str) -> None:
    """The official algorithm and the reference, with the same weights in bfloat16 (float32 on a CPU)."""
    import official_algorithm
    import torch

    from mlx_starflow.reference.sampling import sample as sample_in_torch
    from mlx_starflow.reference.starflow import STARFlow as TorchSTARFlow
    from mlx_starflow.sampling import SamplingTrace

    dtype = torch.float32 if where == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = TorchSTARFlow(flow.config)
    weights = {
        name: torch.from_numpy(np.array(value.astype(mx.float32))).to(where, dtype)
        for name, value in parameters(flow).items()
    }
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    few, all_of_them = (task(flow, side) for side in sides(flow))

    def run(of: Task, method: str, official: bool) -> tuple[Any, list[int]]:
        z, text, null = (torch.from_numpy(np.array(each)).to(where) for each in (of.z, of.text, of.null_text))
        text, null, trace = text.to(dtype), null.to(dtype), SamplingTrace()
        if official:
            x, trace.evaluations = official_algorithm.sample(model, z, text, null, GUIDANCE, method)
        else:
            x = sample_in_torch(model, z, text, null, GUIDANCE, method, trace=trace)
        return x.cpu(), trace.evaluations

    for method, of in (("jacobi", all_of_them), ("sequential", few)):
        for name in ("official", "reference"):
            label = f"{name}, {'blocks' if method == 'jacobi' else method}, {of.length} tokens"
            timed(label, partial(run, of, method, name == "official"), clock)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="that all of it may take")
    parser.add_argument("--no-tests", action="store_true", help="speed alone")
    parser.add_argument("--no-torch", action="store_true", help="this code alone")
    parser.add_argument("--small", action="store_true", help="a flow of 64 tokens, on anything")
    args = parser.parse_args(arguments)
    if not 0 < args.minutes < math.inf:
        parser.error("--minutes must be greater than 0")
    clock, cuda = Clock(args.minutes), has_cuda_torch()
    if device() == "cpu" and not args.small:
        parser.error("MLX has no GPU here; --small runs on a CPU")
    say(f"{mx.device_info().get('device_name', 'unknown')}, MLX {mx.__version__} on {device()}")
    if not args.no_tests and (ROOT / "tests/parity").is_dir():
        if cuda:
            run_tests("parity of the PyTorch reference on CUDA, float32", PARITY, SHARE * clock.left)
        if device() != "cpu":
            run_tests("tests on this GPU, float32", ["--device", "gpu", *USERS], SHARE * clock.left)
    speed = bandwidth()
    say(f"a matrix-vector product reads {speed / 1e9:.0f} GB/s")
    flow = evaluated(make_flow(args.small), automatic_dtype())
    count = sum(value.size for value in parameters(flow).values())
    say(f"a flow of {count / 1e6:,.1f} million weights in {dtype_name(products_in(flow))}")
    widths(flow, speed)
    say("\n| program, method | seconds | network evaluations | ms each | certificate: max, RMS |")
    say("|---" * 5 + "|")
    own_rows(f"mlx, {dtype_name(products_in(flow))}", flow, clock)
    if not args.no_torch and (cuda or args.small):
        try:
            torch_rows(flow, clock, "cuda" if cuda else "cpu")
        except ImportError:
            say("| PyTorch is not installed | | | | |")
    del flow
    mx.clear_cache()
    packed = make_flow(args.small)
    quantize_module(packed, "4")
    evaluated(packed, automatic_dtype(quantized_flow=True))
    own_rows(f"mlx, 4 bits, {dtype_name(products_in(packed))} numbers", packed, clock)
    say("\nin 4 bits:")
    widths(packed, speed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("\nstopped")
        sys.exit(130)
