"""Every figure of docs/speed.md: this code against PyTorch, on the same weights and noise, in turn, in one process.

    python examples/train_latent_flow.py data/scenes runs/latent
    python examples/reports/speed.py --trained runs/latent/model     # on a machine that has nothing else to do

Two flows are sampled, in float32, one picture at a time: *random*, the architecture of the released image model in
small with random weights, and *trained*, a model directory. Three programs sample them: the official algorithm in
PyTorch (official_algorithm.py), the PyTorch reference of this package (mlx_starflow/reference), and the package in MLX.
Needs PyTorch: pip install '.[torch]'.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import official_algorithm
import torch

from mlx_starflow import cpu
from mlx_starflow.bench.contenders import (
    Contender,
    Measurement,
    measure,
    own_contender,
    product_seconds,
    reference_bytes,
)
from mlx_starflow.bench.products import WeightProducts
from mlx_starflow.bench.trials import PROMPTS, Task, prepare
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.quantization import dequantize_module
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.planning.traffic import READ_ONCE, evaluation_bytes
from mlx_starflow.reference.sampling import sample as sample_in_torch
from mlx_starflow.reference.starflow import STARFlow as TorchSTARFlow
from mlx_starflow.sampling import (
    GuidedFlow,
    JacobiSettings,
    SamplingOptions,
    SamplingPlan,
    SamplingTrace,
    SequentialSettings,
)
from mlx_starflow.sampling.decoder import BlockDecoder
from mlx_starflow.sampling.trials import describe
from mlx_starflow.sampling.tuning import tune

GUIDANCE = 2.5
TORCH_METHODS = {"sequential": SequentialSettings(), "jacobi": JacobiSettings()}
TOLERANCE = 1e-2
"""Of plans, where the official algorithm does not give one: that of `mlx-starflow tune`."""
STRICT = "jacobi, as right as auto"
FEWEST = ", fewest evaluations"
EQUAL = ", equal certificate"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
NEAR = 256
"""Tokens before the first of the two positions at which the cost of a token is measured."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- what is sampled


def random_flow(width: int, layers: list[int], side: int, text: int) -> STARFlow:
    """The released image model's architecture, with small last layers, so that it does not blow up what it reads."""
    config = FlowConfig(
        img_size=side,
        channel_size=4,
        patch_size=1,
        channels=width,
        layers_per_block=layers,
        txt_size=text,
        txt_dim=width,
        use_softplus=True,
        use_final_norm=True,
        soft_clip=4.0,
    )
    mx.random.seed(0)
    flow = STARFlow(config)
    for block in flow.blocks:
        block.proj_out.weight = 0.4 * width**-0.5 * mx.random.normal(block.proj_out.weight.shape)
    mx.eval(flow.parameters())
    return flow


def random_pictures(flow: STARFlow, count: int) -> Task:
    """Noise for `count` pictures and random embeddings of as many prompts."""
    config = flow.config
    z = mx.array(draw_noise(range(count), (config.img_size, config.img_size, config.channel_size)))
    text = mx.array(draw_noise(range(100, 101 + count), (config.txt_size, config.txt_dim)))
    return Task(flow, z, text[:-1], text[-1:], GUIDANCE)


def trained_pictures(model: Path, count: int) -> Task:
    """The same for a model directory and real prompts; quantized weights are made dense."""
    task = prepare(model, PROMPTS[:count], guidance=GUIDANCE, dtype=mx.float32).task
    dequantize_module(task.flow)
    mx.eval(task.flow.parameters())
    return task


def first(pictures: Task) -> Task:
    return replace(pictures, z=pictures.z[:1], text=pictures.text[:1])


# ---- PyTorch


class Reference:
    """The PyTorch reference of a flow with the same weights, and the picture it samples."""

    def __init__(self, task: Task):
        with torch.device("meta"):
            self.flow = TorchSTARFlow(task.flow.config)
        weights = {name: torch.from_numpy(np.array(value)) for name, value in parameters(task.flow).items()}
        self.flow.load_state_dict(weights, assign=True)
        self.flow.eval().requires_grad_(False)
        arrays = (task.z, task.text, task.null_text)
        self.arguments = (*(torch.from_numpy(np.array(array)) for array in arrays), GUIDANCE)

    def official(self, method: str | JacobiSettings) -> tuple[mx.array, list[int]]:
        x, evaluations = official_algorithm.sample(self.flow, *self.arguments, method)
        return mx.array(x.numpy()), evaluations

    def own(self, method: str) -> tuple[mx.array, list[int]]:
        trace = SamplingTrace()
        x = sample_in_torch(self.flow, *self.arguments, method, trace=trace)
        return mx.array(x.numpy()), trace.evaluations

    def contenders(self) -> Iterator[Contender]:
        sizes = [reference_bytes(block) for block in self.flow.blocks]
        for name, run in (("official", self.official), ("reference", self.own)):
            for method, settings in TORCH_METHODS.items():
                yield Contender(method, name, partial(run, method), [settings] * len(sizes), sizes)

    def strict(self, task: Task) -> Contender:
        """The official blocks, iterated until the certificate is within the tolerance of plans."""
        settings = JacobiSettings()
        while task.certify(self.official(settings)[0]).max > TOLERANCE:
            settings = replace(settings, threshold=settings.threshold / 2)
        say(f"official blocks need a threshold of {settings.threshold:.1e} for a certificate of {TOLERANCE:g}")
        sizes = [reference_bytes(block) for block in self.flow.blocks]
        return Contender(STRICT, "official", partial(self.official, settings), [settings] * len(sizes), sizes)


class ReferenceProducts(WeightProducts):
    """The weight products as PyTorch computes them."""

    def __init__(self, flow: TorchSTARFlow, task: Task):
        super().__init__(task.flow, task.rows())
        self.reference = [
            [
                module
                for name, module in block.named_modules()
                if isinstance(module, torch.nn.Linear) and name.partition(".")[0] not in READ_ONCE
            ]
            for block in flow.blocks
        ]

    def _products(self, index: int, tokens: int) -> Callable[[], Callable[[], None]]:
        layers = self.reference[index]
        inputs = [torch.randn(self.rows[index], tokens, layer.in_features) for layer in layers]

        @torch.inference_mode()
        def multiply() -> None:
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)

        return lambda: multiply


# ---- the comparison


@dataclass
class Comparison:
    """Measurements by program ("official", "reference", "mlx") and method, and what their products take alone."""

    measured: dict[tuple[str, str], Measurement]
    products: dict[tuple[str, str], float]

    def times(self, slow: tuple[str, str], fast: tuple[str, str]) -> float:
        return self.measured[slow].median / self.measured[fast].median

    def row(self, key: tuple[str, str]) -> str:
        one, alone = self.measured[key], self.products[key]
        cells = [
            ", ".join(key),
            f"{one.median:.2f} ({min(one.seconds):.2f}-{max(one.seconds):.2f})",
            *(f"{self.times(('official', method), key):.2f}" for method in TORCH_METHODS),
            f"{' + '.join(map(str, one.evaluations))} = {sum(one.evaluations)}",
            f"{one.certificate.max:.1e}, {one.certificate.rms:.1e}",
            f"{alone:.2f}",
            f"{one.median / alone:.2f}",
        ]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "program, method",
    "seconds (range)",
    "times as fast as official, sequential",
    "as official, jacobi",
    "network evaluations",
    "certificate: max, RMS",
    "weight products alone, s",
    "seconds / these",
)


def compare(title: str, pictures: Task, rounds: int, equal: bool = False) -> Comparison:
    """Sample the first of some pictures in every way, with plans tuned on all of them, and print the table.

    With `equal`, also with plans as right as the official algorithm, and with that made as right as a plan.
    """
    task = first(pictures)
    reference = Reference(task)
    say(f"{title}: tuning")
    theirs = list(reference.contenders())
    plans = {"auto": tune_to(TOLERANCE, pictures)}
    if equal:
        theirs.append(reference.strict(task))
        reached = task.certify(reference.official("jacobi")[0]).max
        plans |= {
            f"auto{FEWEST}": tune_to(TOLERANCE, pictures, "evaluations"),
            f"auto{EQUAL}": tune_to(reached, pictures),
            f"auto{EQUAL}{FEWEST}": tune_to(reached, pictures, "evaluations"),
        }
    ours = [own_contender(name, task, name) for name in ("sequential", "jacobi", "rolling")]
    ours += [own_contender(name, task, plan) for name, plan in plans.items()]
    measured = measure([*theirs, *ours], task.certify, rounds, say)
    products = {"mlx": WeightProducts(task.flow, task.rows())}
    products["official"] = products["reference"] = ReferenceProducts(reference.flow, task)
    found = {(one.contender.backend, one.contender.method): one for one in measured}
    alone = {key: product_seconds(one, products[key[0]], task.lengths) for key, one in found.items()}
    comparison = Comparison(found, alone)

    layers = " + ".join(str(block.config.num_layers) for block in reversed(task.flow.blocks))
    print(f"\n## {title}\n")
    width = task.flow.config.channels
    print(f"{task.length} tokens, width {width}, {layers} layers (deep block first), guidance {GUIDANCE}.")
    print(f"Seconds are the median of {rounds} rounds, in each of which every row ran once.\n")
    print(f"| {' | '.join(HEAD)} |")
    print("|---" * len(HEAD) + "|")
    for key in found:
        print(comparison.row(key))
    print()
    for name, plan in plans.items():
        blocks = "; ".join(describe(settings) for settings in reversed(plan.blocks))
        print(f"{name}: tuned to {plan.tolerance:.1e} on {pictures.images} pictures, with the timed one: {blocks}.")
    return comparison


def tune_to(tolerance: float, pictures: Task, least: str = "seconds") -> SamplingPlan:
    conditions = pictures.text, pictures.null_text, pictures.guidance
    return tune(pictures.flow, pictures.z, *conditions, tolerance=tolerance, least=least, report=say)


# ---- the cost of a token


def cost_by_position(flow: STARFlow, steps: int, rounds: int) -> float:
    """Print what a token of the deep block costs near the start and at the end; returns how much more the later one
    costs than its bytes, weights and cache, do."""
    task = random_pictures(flow, 1)
    block, index = flow.blocks[-1], len(flow.blocks) - 1
    guided = GuidedFlow(flow, task.z.shape, task.text, task.null_text, SamplingOptions(task.guidance))
    starts = (min(NEAR, task.length - steps), task.length - steps)
    decoders = [filled(guided, index, flow.tokens(task.z), start) for start in starts]
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for start, decoder, times in zip(starts, decoders, seconds, strict=True):
            began = time.perf_counter()
            for n in range(start, start + steps):
                decoder.invert(n, n + 1)
            mx.eval(decoder.data(start, start + steps))
            if number:  # the first is to warm up
                times.append((time.perf_counter() - began) / steps)
            decoder.trim(steps)
    config = block.config
    position = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * block.dtype.size
    prefix = decoders[0].network.prefix_length
    read = [evaluation_bytes(block) + position * (prefix + start + steps // 2) for start in starts]
    near, far = (statistics.median(times) for times in seconds)
    expected = near * read[1] / read[0]
    print(f"\n## The cost of a token\n\nDeep block of {config.num_layers} layers of width {config.channels}, guided.\n")
    print("| token number | milliseconds | MB read: weights and cache | GB/s |\n|---|---|---|---|")
    for start, took, size in zip(starts, (near, far), read, strict=True):
        print(f"| {start + steps // 2} | {1e3 * took:.2f} | {size / 1e6:.1f} | {size / took / 1e9:.2f} |")
    print(f"\nAt the earlier one's bandwidth the later one would take {1e3 * expected:.2f} ms.")
    return far / expected


def filled(guided: GuidedFlow, index: int, x: mx.array, start: int) -> BlockDecoder:
    """A decoder that knows the tokens before number `start`, fed a few at a time to save memory."""
    decoder = guided.decoder(index, 1, x.shape[1])
    decoder.begin(x)
    for begin in range(decoder.first, start, NEAR):
        mx.eval(decoder.predict(begin, min(begin + NEAR, start)))
    return decoder


# ---- targets


def targets(random: Comparison, trained: Comparison | None, position: float) -> None:
    """Print what was aimed at, and whether it is reached."""
    ours, official = ("mlx", "sequential"), ("official", "sequential")
    blocks, official_blocks = ("mlx", "jacobi"), ("official", "jacobi")
    found = [
        ("random: sequential sampling takes at most 1.4 times its own weight products",
         random.measured[ours].median / random.products[ours], 1.4, False),
        ("random: sequential sampling is at least 1.7 times as fast as the official algorithm",
         random.times(official, ours), 1.7, True),
        ("random: Jacobi blocks are not slower than the official algorithm",
         random.times(official_blocks, blocks), 1.0, True),
    ]  # fmt: skip
    if trained is not None:
        found.append(("trained: Jacobi blocks are not slower than the official algorithm",
                      trained.times(official_blocks, blocks), 1.0, True))  # fmt: skip
        for plan, name, other in (
            (f"auto{EQUAL}", "the official Jacobi blocks", official_blocks),
            ("auto", f"official Jacobi blocks that keep to {TOLERANCE:g} too", ("official", STRICT)),
            ("auto", "official sequential sampling", official),
        ):
            for kind, what in ((FEWEST, "the plan of fewest evaluations"), ("", "the fastest plan")):
                counts = [sum(trained.measured[key].evaluations) for key in (("mlx", plan + kind), other)]
                found.append((f"trained, {plan}: {what} takes at most 1/4 of the evaluations of {name}",
                              counts[0] / counts[1], 0.25, False))  # fmt: skip
                found.append((f"trained, {plan}: {what} is at least 2 times as fast as {name}",
                              trained.times(other, ("mlx", plan + kind)), 2.0, True))  # fmt: skip
    found.append(("the last token costs at most 1.3 times what its bytes do", position, 1.3, False))
    print("\n## Targets\n\n| target | measured | |\n|---|---|---|")
    for what, value, bound, at_least in found:
        met = value >= bound if at_least else value <= bound
        print(f"| {what} | {value:.2f} | {'met' if met else 'not met'} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, help="a model directory, of examples/train_latent_flow.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tune", type=int, default=3, help="pictures to tune plans on")
    parser.add_argument("--width", type=int, default=512, help="of the random flow")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 2, 8], help="of its blocks, data side first")
    parser.add_argument("--side", type=int, default=16, help="of its latents")
    parser.add_argument("--text", type=int, default=32, help="tokens of its prompts")
    parser.add_argument("--long-side", type=int, default=64, help="of the latents for the cost of a token")
    parser.add_argument("--steps", type=int, default=32, help="tokens to measure that with")
    args = parser.parse_args(arguments)
    chosen = [f"{name}={os.environ[name]}" for name in THREADS if name in os.environ]
    print(platform.platform(), platform.processor() or platform.machine(), os.cpu_count(), "CPUs", *chosen)
    layers = f", networks in C++, {cpu.network_threads()} threads" if cpu.has_fast_networks() else ""
    theirs = f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"MLX {mx.__version__}, {cpu.describe()}{layers}; {theirs}")
    flow = random_flow(args.width, args.layers, args.side, args.text)
    random = compare("Random weights", random_pictures(flow, args.tune), args.rounds)
    trained = None
    if args.trained:
        trained = compare("Trained weights", trained_pictures(args.trained, args.tune), args.rounds, equal=True)
    position = cost_by_position(
        random_flow(args.width, args.layers, args.long_side, args.text), args.steps, args.rounds
    )
    targets(random, trained, position)


if __name__ == "__main__":
    main()
