"""One step of training: gradients of micro-batches, their mean over processes, clipping, the optimizer, the average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.gradient_checkpointing import weights_first
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.objective import Batch, Metrics
from mlx_starflow.training.loop.optimizers import GroupedOptimizer, embedding_names
from mlx_starflow.training.loop.score_matching import denoiser_loss, denoiser_weights, new_probe, split_weights
from mlx_starflow.training.loop.sharding import Shards
from mlx_starflow.training.loop.weights import Weights, assign, clipped, trainable, update_average

Loss = Callable[[Any, Batch], tuple[mx.array, Metrics]]
ExtraLoss = Callable[[Any, Batch, mx.array], tuple[mx.array, Metrics]]


def count_tokens(model: Any, batch: Mapping[str, np.ndarray]) -> int:
    """Tokens of a flow in a batch; 0 if it is not a flow's."""
    patch = getattr(getattr(getattr(model, "flow", model), "config", None), "patch_size", None)
    latents = batch.get("latents")
    return 0 if patch is None or latents is None else int(np.prod(latents.shape[:-1])) // patch**2


def _floats(numbers: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items()}


class StepMaker:
    """Holds the optimizer and the average of a model's trainable weights, and moves all three.

    Attributes:
        optimizer: the optimizer.
        average: averaged weights by name; {} if the config wants none.
        random: whether steps need a random key.
        shards: the layers' shares, while there are any.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        extra_loss: ExtraLoss | None,
        config: TrainingConfig,
        group: mx.distributed.Group,
    ):
        self.model, self.loss, self.extra_loss, self.config, self.group = model, loss, extra_loss, config, group
        self.random = extra_loss is not None
        self._denoiser = denoiser_weights(model)
        self.dtype: mx.Dtype | None = None if config.dtype is None else getattr(mx, config.dtype)
        if self.dtype is not None:
            assign(model, {name: weight.astype(mx.float32) for name, weight in trainable(model).items()})
        weights = trainable(model)
        if any(weight.dtype == mx.float16 for weight in weights.values()):
            raise StarflowError(
                "the weights to train are float16, whose range gradients leave: load the network with "
                'dtype="float32", or say dtype="bfloat16" in TrainingConfig'
            )
        self.average: Weights = dict(weights) if config.ema else {}
        self.optimizer = GroupedOptimizer(
            weights,
            kind=config.optimizer,
            betas=config.betas,
            weight_decay=config.weight_decay,
            is_fast=lambda name: name.endswith("text_encoder.shared.weight"),
            factor=config.embedding_factor,
            embeddings=embedding_names(model),
        )
        self.shards: Shards | None = None
        self._state = state = [model.state, self.optimizer.state, self.average]
        # What can be done in one compiled function is done in one: intermediate gradients need not exist at once.
        self._whole = config.accumulate == 1 and group.size() == 1 and not config.skip
        if self._whole:
            self._fused = partial(mx.compile, inputs=state, outputs=state)(self._gradients_and_update)
        else:
            self._gradients = partial(mx.compile, inputs=[model.state])(self._plain_gradients)
            self._update = partial(mx.compile, inputs=state, outputs=state)(self._plain_update)

    def __call__(
        self, batch: Mapping[str, np.ndarray], key: int, lr: float, decay: float
    ) -> tuple[dict[str, float], bool]:
        """One step with the whole batch of all processes: (means of its numbers, whether it was applied)."""
        parts = self.config.accumulate * self.group.size()
        keys = mx.random.split(mx.random.key(key), parts) if self.random else [mx.array(0)] * parts
        rates = mx.array(lr), mx.array(decay)
        if self._whole:
            numbers = self._fused(distributed.share(batch, 0, 1), keys[0], *rates)
            mx.eval(numbers, self._state)
            return _floats(numbers), True
        total: Weights = {}
        rows = []
        for index in range(self.config.accumulate):
            part = self.group.rank() * self.config.accumulate + index
            gradients, numbers = self._gradients(distributed.share(batch, part, parts), keys[part])
            if total:
                gradients = {name: total[name] + gradient for name, gradient in gradients.items()}
            total = gradients
            # Each micro-batch's graph must be gone before the next one is made.
            mx.eval(total, numbers)
            rows.append(_floats(numbers))
        if self.config.accumulate > 1:
            total = {name: gradient / self.config.accumulate for name, gradient in total.items()}
        gradients, arrays = self._averaged(total)
        del total
        norms = _floats(arrays)
        means = {**distributed.mean_numbers(rows, self.group), **norms}
        if self.config.skip and max(norms.values()) > self.config.skip:
            return means, False
        self._update(gradients, *rates)
        mx.eval(self._state)
        return means, True

    def _averaged(self, gradients: Weights) -> tuple[Weights, Metrics]:
        """The clipped mean over processes, and its norms before. Those of shared weights are means already."""
        if self.shards is None:
            return self._clipped(distributed.average(gradients, self.group))
        own = {name: gradient for name, gradient in gradients.items() if name not in self.shards.names}
        return self._clipped({**gradients, **distributed.average(own, self.group)})

    def _clipped(self, gradients: Weights) -> tuple[Weights, Metrics]:
        """Gradients of the flow and of its denoiser, each with a norm of at most `config.clip`, and what it was."""
        flow, denoiser = split_weights(gradients, self._denoiser)
        flow, norm = clipped(flow, self.config.clip, self.shards.squares(flow) if self.shards else None)
        norms = {"grad": norm}
        if denoiser:
            denoiser, norms["denoiser-grad"] = clipped(denoiser, self.config.clip)
        return {**flow, **denoiser}, norms

    def _plain_gradients(self, batch: Batch, key: mx.array) -> tuple[Weights, Metrics]:
        held = dict(tree_flatten(self.model.parameters()))
        weights, denoiser = split_weights(trainable(self.model), self._denoiser)
        probe = new_probe(batch) if denoiser else {}

        def objective(weights: Weights, probe: dict[str, mx.array]) -> tuple[mx.array, Metrics]:
            self._hold(held, weights)
            loss, metrics = self.loss(self.model, {**batch, **probe})
            numbers = {"loss": loss, **metrics}
            if self.extra_loss is not None:
                term, named = self.extra_loss(self.model, batch, key)
                numbers = {"loss": loss + term, **metrics, "extra": term, **named}
            return numbers["loss"], numbers

        def matching(weights: Weights, gradient: mx.array) -> mx.array:
            self._hold(held, weights)
            return denoiser_loss(self.model, batch, gradient, self.config.checkpoint_layers)

        with weights_first():
            if not denoiser:
                (_, numbers), gradients = mx.value_and_grad(objective)(weights, probe)
            else:
                (_, numbers), (gradients, probe) = mx.value_and_grad(objective, argnums=(0, 1))(weights, probe)
                numbers["denoiser"], own = mx.value_and_grad(matching)(denoiser, probe["probe"])
                gradients = {**gradients, **own}
        assign(self.model, held)
        return gradients, numbers

    def _hold(self, held: Weights, weights: Weights) -> None:
        """Have the model compute with these weights, in the dtype it computes in."""
        assign(self.model, weights if self.dtype is None else self._cast({**held, **weights}))

    def _cast(self, weights: Weights) -> Weights:
        assert self.dtype is not None
        return {name: w.astype(self.dtype) for name, w in weights.items() if mx.issubdtype(w.dtype, mx.floating)}

    def _plain_update(self, gradients: Weights, lr: mx.array, decay: mx.array) -> None:
        weights = self.optimizer.apply(gradients, trainable(self.model), lr)
        assign(self.model, weights)
        if self.average:
            update_average(self.average, weights, decay)

    def _gradients_and_update(self, batch: Batch, key: mx.array, lr: mx.array, decay: mx.array) -> Metrics:
        gradients, numbers = self._plain_gradients(batch, key)
        gradients, norms = self._clipped(gradients)
        self._plain_update(gradients, lr, decay)
        return {**numbers, **norms}

    def whole_state(self) -> tuple[Weights, Weights, Weights]:
        """Weights, average and optimizer state for a checkpoint."""
        if self.shards is None:
            return trainable(self.model), self.average, self.optimizer.flat_state()
        return self.whole_weights(), self.shards.whole(self.average), self.shards.whole_state()

    def whole_weights(self) -> Weights:
        """The trained weights that the model holds now."""
        weights = trainable(self.model)
        return weights if self.shards is None else self.shards.whole(weights)

    def shard(self) -> None:
        """Keep a share of the layers' weights alone, see `Shards`."""
        self.shards = Shards(self.model, self.average, self.optimizer, self.group)

    def unshard(self) -> None:
        """The model holds its whole weights again."""
        if self.shards is not None:
            self.shards.undo()
            self.shards = None

    def share_state(self, note: Any) -> Any:
        """All processes take the weights, averages and optimizer state of rank 0, and its `note`, which is returned."""
        parts = dict(zip(("weights", "average", "optimizer"), self.whole_state(), strict=True))
        flat = {f"{part}:{name}": array for part, arrays in parts.items() for name, array in arrays.items()}
        flat, note = distributed.from_first(flat, note, self.group)

        def of(part: str) -> Weights:
            return {name: flat[f"{part}:{name}"] for name in parts[part]}

        assign(self.model, of("weights"))
        self.average.update(of("average"))
        self.optimizer.load_flat_state(of("optimizer"))
        return note
