"""What one evaluation of the released model's deep block launches on a GPU, operation by operation.

    python examples/reports/operations.py
    python examples/reports/operations.py --tokens 8

An evaluation of one token waits for its weights and for the launches of its operations, so their number counts. They
are read from the graph that MLX would run: that of the deep block in float16 with guidance, its text in the cache. How
wide a block is does not change its graph, so narrow blocks of one layer and of two stand for it: what two have more
than one is a layer. No GPU is needed: MLX's norms and its attention, which are many operations on a CPU, are counted as
the single ones that they are on a GPU, and so is the fused kernel for rotary positions, which Metal has.

A rolling window reads how many tokens an evaluation has finished before the next one can begin. What Python takes from
there to the first layer that a GPU is given is the time for which that has nothing to do; it is measured too, here.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_starflow import cpu
from mlx_starflow.model_dir.weights import cast_weights
from mlx_starflow.models import transformer
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.planning.memory import ModelConfigs
from mlx_starflow.sampling import GuidedFlow, RollingSettings, SamplingOptions
from mlx_starflow.sampling.decoder import BlockDecoder
from mlx_starflow.sampling.noise_floor import NoiseFloor
from mlx_starflow.sampling.sampler import invert_steps

VIEWS = frozenset("Broadcast CustomTransforms ExpandDims Flatten Reshape Slice Split Squeeze Transpose View".split())
"""Operations that give another view of an array; they launch nothing."""

NAMES = {
    "Sort": "norm",
    "Concatenate": "attention",
    "CumSum": "fused rotary positions",
    "AddMM": "product",
    "Matmul": "product",
    "SliceUpdate": "into the cache",
    "AsType": "change of precision",
}
"""What the report calls operations. The first three are stand-ins, and whatever is not named is elementwise."""


def norm(x: mx.array, *weights: Any, **options: Any) -> mx.array:
    return mx.sort(x)


def attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
    return mx.concatenate([q, k, v], axis=2)[:, :, : q.shape[2]]


def split_rotate(
    qkv: mx.array, rope_frequencies: mx.array, *norms: mx.array, num_heads: int, num_kv_heads: int, half_split: bool
) -> list[mx.array]:
    batch, length, width = qkv.shape
    heads = num_heads + 2 * num_kv_heads
    made = mx.cumsum(qkv).reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)
    return mx.split(made, [num_heads, num_heads + num_kv_heads], axis=1)


@contextmanager
def as_on_a_gpu(metal: bool) -> Iterator[None]:
    """Inside, what is one operation on a GPU, on Metal or else on CUDA, is one in graphs, of the right shape."""
    with ExitStack() as stack:
        for name, one in (("layer_norm", norm), ("rms_norm", norm), ("scaled_dot_product_attention", attention)):
            stack.enter_context(patch.object(mx.fast, name, one))
        stack.enter_context(patch.object(cpu, "has_fast_networks", lambda: False))
        if metal:
            stack.enter_context(patch.object(transformer, "split_rotate", split_rotate))
        yield


def deep_block(layers: int) -> BlockDecoder:
    """A decoder of a narrow deep block of so many layers, in float16 with guidance; its text is in the cache."""
    config = ModelConfigs.of_release("apple/starflow").flow
    config = replace(config, channels=128, img_size=8, txt_size=8, txt_dim=16, layers_per_block=[2, layers])
    flow = STARFlow(config)
    cast_weights(flow, mx.float16)
    text = mx.zeros((2, config.txt_size, config.txt_dim))
    shape = (1, config.img_size, config.img_size, config.channel_size)
    mx.eval(flow.parameters(), text)
    guided = GuidedFlow(flow, shape, text[:1], text[1:], SamplingOptions(guidance=1.0))
    return guided.decoder(1, 1, config.img_size**2)


def graph(layers: int, tokens: int, metal: bool) -> Counter[str]:
    """Operations of an evaluation of `tokens` tokens by a deep block of so many layers."""
    # What is given to a GPU early is no longer in the graph.
    with as_on_a_gpu(metal), patch.object(mx, "async_eval"):
        decoder = deep_block(layers)
        inputs = mx.zeros((2, tokens, decoder.block.config.in_channels))
        mx.eval(inputs, decoder.network.rope_frequencies)
        parameters = decoder.network(inputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "graph.dot")
        mx.export_to_dot(str(file), parameters)
        nodes = re.findall(r'label ?="([^"]*)", shape=rectangle', file.read_text())
    return Counter(nodes)


def launched(nodes: Counter[str]) -> Counter[str]:
    """What a graph launches, by the report's names."""
    counts: Counter[str] = Counter()
    for node, count in nodes.items():
        kind = node.split()[0]
        if kind not in VIEWS:
            counts[NAMES.get(kind, "elementwise")] += count
    return counts


def per_layer(tokens: int, metal: bool) -> Counter[str]:
    """What a layer of the deep block launches in an evaluation of `tokens` tokens."""
    return launched(graph(2, tokens, metal) - graph(1, tokens, metal))


def python_time(layers: int, tokens: int, evaluations: int = 24) -> tuple[float, float]:
    """Microseconds that Python takes from the number of tokens that an evaluation has finished to the first layer of
    the next one, and until that one is built as a whole: medians over a rolling window of `tokens`, of the time of this
    thread alone. Nothing is computed meanwhile."""
    moments: list[list[float]] = []
    suspected = NoiseFloor.suspected

    def known(*arguments: Any) -> bool:
        moments.append([time.thread_time()])
        return suspected(*arguments)

    def given(*arrays: mx.array) -> None:
        if moments:
            moments[-1].append(time.thread_time())

    with as_on_a_gpu(metal=True), patch.object(NoiseFloor, "suspected", known), patch.object(mx, "async_eval", given):
        decoder = deep_block(layers)
        noise = mx.random.normal((1, decoder.length, decoder.block.config.in_channels), key=mx.random.key(0))
        for _ in islice(invert_steps(decoder, noise, RollingSettings(window=tokens)), evaluations):
            pass
    # The first evaluation compiles; after the last one nothing is given. What is given first is the inputs.
    rows = [(row[2] - row[0], row[-1] - row[0]) for row in moments[1:-1]]
    first, whole = (1e6 * median(column) for column in zip(*rows, strict=True))
    return first, whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1, help="of an evaluation")
    args = parser.parse_args(arguments)
    layers = ModelConfigs.of_release("apple/starflow").flow.layers_per_block[-1]
    columns = {}
    for name, metal in (("Metal", True), ("CUDA", False)):
        layer = per_layer(args.tokens, metal)
        around = launched(graph(1, args.tokens, metal)) - layer
        columns[name] = (layer, around)
    print("| operations of a layer | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    kinds = [*dict.fromkeys(NAMES.values()), "elementwise"]
    for kind in kinds:
        if any(layer[kind] for layer, _ in columns.values()):
            print(f"| {kind} | " + " | ".join(str(layer[kind]) for layer, _ in columns.values()) + " |")
    print("| together | " + " | ".join(str(layer.total()) for layer, _ in columns.values()) + " |")
    totals = (layers * layer.total() + around.total() for layer, around in columns.values())
    print(f"| {layers} layers, and around them | " + " | ".join(map(str, totals)) + " |")
    first, whole = python_time(layers, args.tokens)
    print(
        f"\nPython, from the number of finished tokens on: {first:.0f} microseconds to the first layer, "
        f"{whole:.0f} to the last."
    )


if __name__ == "__main__":
    main()
