"""What a flow's own matrix products cost on this machine, by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from time import perf_counter

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow import cpu
from mlx_starflow.models.flow import Condition, Flow
from mlx_starflow.models.transformer import product_dtype
from mlx_starflow.models.trees import flattened
from mlx_starflow.planning.traffic import READ_ONCE, evaluation_bytes

IN_A_ROW = 3


class WeightProducts:
    """The products of every block's weights with a few rows: what an evaluation would cost if nothing else did.

    They are computed as sampling computes them: in the same shapes, precision and way of multiplying, several times in
    a row for each block, so that the caches of a processor hold what they hold while sampling.
    """

    def __init__(self, flow: Flow, rows: Sequence[int], rounds: int = 5):
        """`rows` are the sequences that each block sees at once, data side first, see `Task.rows`."""
        self.flow, self.rows, self.rounds = flow, list(rows), rounds
        self.bytes = [evaluation_bytes(block) for block in flow.blocks]
        self._measured: dict[tuple[int, ...], tuple[float, ...]] = {}

    @cached_property
    def _layers(self) -> list[list[nn.Linear | nn.QuantizedLinear]]:
        layers = []
        for block in self.flow.blocks:
            leaves = flattened(block.leaf_modules(), is_leaf=nn.Module.is_module)
            wanted = [layer for path, layer in leaves if path.partition(".")[0] not in READ_ONCE]
            layers.append([layer for layer in wanted if isinstance(layer, nn.Linear | nn.QuantizedLinear)])
        return layers

    def seconds(self, tokens: Sequence[int]) -> tuple[float, ...]:
        """Seconds that the products of one evaluation of each block take, data side first, the best of all rounds.

        Args:
            tokens: how many tokens each block evaluates at once.
        """
        tokens = tuple(tokens)
        if tokens not in self._measured:
            self._measured[tokens] = self._measure(tokens)
        return self._measured[tokens]

    def _measure(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        best = [math.inf if layers else 0.0 for layers in self._layers]
        products = {index: self._products(index, tokens[index]) for index, time in enumerate(best) if time}
        for _ in range(self.rounds):
            for index in reversed(products):
                for _ in range(IN_A_ROW):
                    multiply = products[index]()
                    start = perf_counter()
                    multiply()
                    best[index] = min(best[index], perf_counter() - start)
        return tuple(best)

    def _products(self, index: int, tokens: int) -> Callable[[], Callable[[], None]]:
        """What prepares the products of one evaluation of a block, and gives what computes them."""
        block, rows = self.flow.blocks[index], self.rows[index]
        if network := cpu.fast_network(block, rows, 1, None, Condition(), 1.0):
            return lambda: partial(network.multiply, tokens)
        layers = self._layers[index]
        inputs = [self._input(layer, self.rows[index], tokens) for layer in layers]
        mx.eval(inputs)
        return lambda: partial(mx.eval, [layer(x) for layer, x in zip(layers, inputs, strict=True)])

    @staticmethod
    def _input(layer: nn.Linear | nn.QuantizedLinear, rows: int, tokens: int) -> mx.array:
        dtype = product_dtype(layer) or mx.float32
        return mx.random.normal((rows, tokens, _width(layer)), dtype, key=mx.random.key(0))

    @property
    def vector_seconds(self) -> tuple[float, ...]:
        """Of one token: matrix-vector products."""
        return self.seconds([1] * len(self.rows))

    @property
    def bandwidth(self) -> float:
        """Bytes of weights a second that matrix-vector products go through, over all blocks."""
        return sum(self.bytes) / sum(self.vector_seconds)


def _width(layer: nn.Linear | nn.QuantizedLinear) -> int:
    """Of a layer's input."""
    width = layer.weight.shape[1]
    return width * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else width
