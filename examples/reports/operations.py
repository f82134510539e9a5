"""What one evaluation of the released model's deep block launches on a GPU, operation by operation.

    python examples/reports/operations.py
    python examples/reports/operations.py --tokens 8

An evaluation of one token waits for its weights and for the launches of its operations, so their number counts. They
are read from the graph that MLX would run: that of the deep block in float16 with guidance, its text in the cache. How
wide a block is does not change its graph, so narrow blocks of one layer and of two stand for it: what two have more
than one is a layer. No GPU is needed: MLX's norms and its attention, which are many operations on a CPU, are counted as
the single ones that they are on a GPU, and so is the fused kernel for rotary positions, which Metal has.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_starflow.model_dir.weights import cast_weights
from mlx_starflow.models import transformer
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.planning.memory import ModelConfigs
from mlx_starflow.sampling import GuidedFlow, SamplingOptions
from mlx_starflow.sampling.network import CompiledNetwork

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
        if metal:
            stack.enter_context(patch.object(transformer, "split_rotate", split_rotate))
        yield


def graph(layers: int, tokens: int, metal: bool) -> Counter[str]:
    """Operations of an evaluation of `tokens` tokens by a deep block of so many layers."""
    config = ModelConfigs.of_release("apple/starflow").flow
    config = replace(config, channels=128, img_size=8, txt_size=8, txt_dim=16, layers_per_block=[2, layers])
    flow = STARFlow(config)
    cast_weights(flow, mx.float16)
    text = mx.zeros((2, config.txt_size, config.txt_dim))
    shape = (1, config.img_size, config.img_size, config.channel_size)
    mx.eval(flow.parameters(), text)
    guided = GuidedFlow(flow, shape, text[:1], text[1:], SamplingOptions(guidance=1.0))
    condition, frequencies = guided.conditions.blocks[1], guided.conditions.rope_frequencies[1]
    block, length = flow.blocks[1], config.img_size**2
    with as_on_a_gpu(metal):
        assert frequencies is not None
        network = CompiledNetwork(block, 2, length, frequencies, condition, 1.0)
        inputs = mx.zeros((2, tokens, config.channel_size))
        mx.eval(inputs, network.rope_frequencies)
        parameters = network(inputs)
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


if __name__ == "__main__":
    main()
