"""Fully sharded training: each process holds a share of every weight of the flow's layers, and of what goes with it.

MLX's `fully_shard` gathers a layer's weights when it runs and scatters the sum of its gradients (as FSDP does, arXiv
2304.11277). Checkpoints hold whole weights, so that they do not depend on how many processes there were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.flow import FlowBlock
from mlx_starflow.training.loop.optimizers import GroupedOptimizer
from mlx_starflow.training.loop.weights import Weights, assign


class Shards:
    """The layers of a model's flow blocks, in shares.

    Args:
        model: holds whole weights, and shares of them from now on.
        average, optimizer: what else is kept of each trained weight; they hold shares from now on.
        group: the processes.

    Attributes:
        names: of the weights that are shared out -> what they are called in the whole model.

    Raises:
        StarflowError: a weight cannot be split, or the optimizer's state cannot.
    """

    def __init__(self, model: nn.Module, average: Weights, optimizer: GroupedOptimizer, group: mx.distributed.Group):
        if optimizer.kind != "adamw":
            raise StarflowError(f"training: --shard needs --optimizer adamw; {optimizer.kind} needs whole matrices")
        self.model, self.average, self.optimizer, self.group = model, average, optimizer, group
        self.names: dict[str, str] = {}
        self._blocks = [
            (path, b) for path, b in model.named_modules() if isinstance(b, FlowBlock) and not b.is_identity
        ]
        for path, block in self._blocks:
            self._shard(path, block)
        self._convert({whole: share for share, whole in self.names.items()}, self._cut)

    def _shard(self, path: str, block: FlowBlock) -> None:
        layers: list[Any] = []
        for index, layer in enumerate(block.attn_blocks):
            where = f"{path}.attn_blocks.{index}"
            weights = dict(tree_flatten(layer.parameters()))
            if odd := [n for n, w in weights.items() if not mx.issubdtype(w.dtype, mx.floating)]:
                raise StarflowError(f"training: --shard cannot split the quantized weight {where}.{odd[0]}")
            try:
                layers.append(nn.fully_shard(layer, group=self.group))
            except ValueError as error:
                raise StarflowError(f"training: --shard: {error}") from None
            self.names.update({f"{where}.module.{name}": f"{where}.{name}" for name in weights})
        block.attn_blocks = layers

    def _cut(self, array: mx.array) -> mx.array:
        return mx.split(array, self.group.size())[self.group.rank()]

    def gather(self, array: mx.array) -> mx.array:
        """A share -> the whole array."""
        whole = mx.distributed.all_gather(array, group=self.group)
        # One at a time, in the same order everywhere.
        mx.eval(whole)
        return whole

    def whole(self, weights: Weights) -> Weights:
        """Weights by name, shares among them -> whole ones by the names of the whole model."""
        return {
            self.names.get(name, name): self.gather(weight) if name in self.names else weight
            for name, weight in weights.items()
        }

    def whole_state(self) -> Weights:
        """The optimizer's state, as `GroupedOptimizer.flat_state` gives it without shares."""
        flat = {}
        for name, array in self.optimizer.flat_state().items():
            weight, _, key = name.rpartition("/")
            shared = weight in self.names
            flat[f"{self.names.get(weight, weight)}/{key}"] = self.gather(array) if shared else array
        return flat

    def squares(self, gradients: Weights) -> mx.array:
        """The sum of squares of a whole gradient."""
        own = sum((mx.square(g).sum() for name, g in gradients.items() if name in self.names), mx.array(0.0))
        rest = sum((mx.square(g).sum() for name, g in gradients.items() if name not in self.names), mx.array(0.0))
        return mx.distributed.all_sum(own, group=self.group) + rest

    def undo(self) -> None:
        """The model, the average and the optimizer hold whole weights again."""
        weights = self.whole(dict(tree_flatten(self.model.parameters())))
        for _, block in self._blocks:
            block.attn_blocks = [layer.get("module", layer) for layer in block.attn_blocks]
        assign(self.model, weights)
        self._convert(dict(self.names), self.gather)
        self.names = {}

    def _convert(self, renamed: dict[str, str], function: Callable[[mx.array], mx.array]) -> None:
        """Average and optimizer go over to other names and parts of arrays."""
        for old in [name for name in self.average if name in renamed]:
            self.average[renamed[old]] = function(self.average.pop(old))
        self.optimizer.rename(renamed, function)
