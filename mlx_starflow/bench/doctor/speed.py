"""How fast this machine is: reading memory, and evaluations of a network by the width of a window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

import mlx.core as mx

from mlx_starflow.bench.doctor.checks import Check, Finding, NotApplicable
from mlx_starflow.bench.doctor.machine import processor
from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.devices import backend
from mlx_starflow.kernels.memory import available
from mlx_starflow.model_dir.weights import automatic_dtype, cast_weights, dtype_name
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.pipelines import load
from mlx_starflow.planning.chips import find_chips
from mlx_starflow.planning.memory import ModelConfigs
from mlx_starflow.planning.traffic import evaluation_bytes
from mlx_starflow.sampling import GuidedFlow

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)

ROUNDS = 5

SHARE = 0.5
"""Of a chip's published bandwidth that reading a matrix must reach."""

ENOUGH = 4 * 2**30
"""Bytes that networks must be allowed for a block of the released model to be tried."""


def checks() -> list[Check]:
    return [
        Check(
            "memory bandwidth",
            f"at least {SHARE:.0%} of the published",
            "Close other programs, plug in the power supply, and try again; sampling takes as much longer.",
            memory_bandwidth,
        ),
        Check(
            "evaluation by width",
            "8 tokens at once take less than 8 alone",
            "Use --method sequential, and report this line: windows gain nothing here.",
            evaluations,
        ),
    ]


def best(function: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, after a first one."""
    function()
    fastest = math.inf
    for _ in range(ROUNDS):
        start = perf_counter()
        function()
        fastest = min(fastest, perf_counter() - start)
    return fastest


def bandwidth() -> float:
    """Bytes a second that a matrix-vector product reads, in the networks' precision."""
    dtype = automatic_dtype()
    side = 4096 if backend() == "CPU" else 8192
    matrix, vector = mx.ones((side, side), dtype), mx.ones((side, 1), dtype)
    mx.eval(matrix, vector)
    return matrix.nbytes / best(lambda: mx.eval(matrix @ vector))


def memory_bandwidth() -> Finding:
    speed = bandwidth()
    measured, values = f"{speed / 1e9:.1f} GB/s", {"bandwidth": speed}
    try:
        published = min(chip.bandwidth for chip in find_chips(processor()))
    except StarflowError:
        raise NotApplicable("nothing to compare it with is known of this processor", measured, values) from None
    return Finding(
        f"{measured} of {published:g}", speed >= SHARE * published * 1e9, {**values, "published": published * 1e9}
    )


def evaluations() -> Finding:
    """Of the last block of what `trial` gives, with nothing in its cache."""
    name, guided, shape = trial()
    flow, index = guided.flow, len(guided.flow.blocks) - 1
    length = flow.noise_tokens(mx.zeros((1, *shape))).shape[1]
    network = guided.decoder(index, 1, length).network
    tokens = mx.random.normal((1, length, flow.blocks[index].config.in_channels), key=mx.random.key(0))
    mx.eval(tokens)

    def evaluate(count: int) -> None:
        mx.eval(network(tokens[:, :count]))
        network.trim(count)

    seconds = {count: best(partial(evaluate, count)) for count in WIDTHS if count <= length}
    values = {f"width_{count}": time for count, time in seconds.items()}
    measured = ", ".join(f"{count}: {1e3 * time:.2f}" for count, time in seconds.items())
    if backend() != "CPU":  # a CPU's caches hold the embedded model
        values["weights"] = evaluation_bytes(flow.blocks[index]) / bandwidth()
        measured += f"; reading its weights takes {1e3 * values['weights']:.2f}"
    precision = dtype_name(automatic_dtype())
    return Finding(f"{name}, {precision}, ms {measured}", seconds[8] < 8 * seconds[1], values)


def trial() -> tuple[str, GuidedFlow, tuple[int, int, int]]:
    """What is timed, its name and the shape of its latents: a shallow block of the released 3 B model with random
    weights, or, on a CPU and where memory is short, the embedded model."""
    if backend() != "CPU" and available() >= ENOUGH:
        config = replace(ModelConfigs.of_release("apple/starflow").flow, layers_per_block=[2], txt_size=0, txt_dim=0)
        flow = STARFlow(config)
        cast_weights(flow, automatic_dtype())
        mx.eval(flow.parameters())
        shape = (config.img_size, config.img_size, config.channel_size)
        return "3 B model's shallow block", GuidedFlow(flow, (1, *shape)), shape
    pipe = load("demo")
    shape = pipe.latent_shape()
    text = pipe.encode_prompts([""])
    return "embedded model's deep block", GuidedFlow(pipe.dense_flow(), (1, *shape), text), shape
