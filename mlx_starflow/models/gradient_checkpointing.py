"""Layers that a gradient computes again instead of keeping what they computed (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

_weights_first: ContextVar[bool] = ContextVar("weights_first", default=False)


@contextmanager
def weights_first() -> Iterator[None]:
    """For gradients of all trainable weights: a layer's are computed before the gradient goes on to the layer before.

    MLX orders by what depends on what, and would else keep what the weights' gradients need of all layers, three to
    seven times as much as their inputs. Where only the gradient of the data is wanted, this would compute the others
    for nothing.
    """
    token = _weights_first.set(True)
    try:
        yield
    finally:
        _weights_first.reset(token)


def checkpointed(module: nn.Module, function: Callable[..., mx.array] | None = None) -> Callable[..., mx.array]:
    """A layer, or a function of it, whose gradient keeps its input alone; see `weights_first`.

    Args:
        module: the layer; gradients flow to its trainable weights.
        function: its first argument is an array to which gradients flow, the others are constants; None: the layer.
    """
    function = function or module

    def call(h: mx.array, *constants: Any) -> mx.array:
        ordered = _weights_first.get()
        found = dict(tree_flatten(module.trainable_parameters()))

        def run(h: mx.array, *weights: mx.array) -> mx.array:
            held = module.trainable_parameters()
            module.update(tree_unflatten(list(zip(found, weights, strict=True))))
            try:
                return function(h, *constants)
            finally:
                module.update(held)

        layer = mx.custom_function(run)

        @layer.vjp
        def _(inputs: Any, cotangent: mx.array, output: mx.array) -> Any:
            # Not before the cotangent is there.
            inputs = mx.depends(list(inputs) if found else [inputs], [cotangent])
            _, (back, *gradients) = mx.vjp(lambda *inputs: [run(*inputs)], inputs, [cotangent])
            if gradients and ordered:
                (back,) = mx.depends([back], gradients)
            return (back, *gradients) if found else back

        return cast(mx.array, layer(h, *found.values()))

    return call
