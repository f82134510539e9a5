"""Validation: exact likelihood of held-out data, the best weights so far, and when there is no hope of better ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.nll import HALF_LOG_2PI, standard_error
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import IndexedData
from mlx_starflow.training.loop.checkpoint import read_arrays, write_arrays
from mlx_starflow.training.loop.objective import Batch
from mlx_starflow.training.loop.weights import Weights, check_same

BEST = "best.safetensors"


class Validation:
    """Measures a model on held-out data and keeps the weights that did best, in `folder/best.safetensors`.

    Every measurement reads all samples once, whole and with their captions, with the same noise.

    Attributes:
        state: what a checkpoint keeps: the `best` NLL, the `step` it was found at and `worse`, how many measurements
            in a row were no better.
    """

    def __init__(
        self,
        folder: Path,
        data: IndexedData,
        nll: Callable[[Any, Batch], mx.array],
        config: TrainingConfig,
        group: mx.distributed.Group,
        unit: str = "nats/dim",
        constant: float = HALF_LOG_2PI,
    ):
        self.folder, self.data, self.nll, self.group, self.unit = folder, data, nll, group, unit
        self.constant = constant
        self.config = replace(config, caption_dropout=0.0, context_full=0.0, context_partial=0.0)
        self.state: dict[str, Any] = {"best": None, "step": 0, "worse": 0}
        self._last = ""

    def __str__(self) -> str:
        return self._last

    @property
    def exhausted(self) -> bool:
        """Whether training is to stop early."""
        return bool(self.config.patience) and self.state["worse"] >= self.config.patience

    def measure(self, model: Any, step: int, weights: Callable[[], Weights]) -> dict[str, Any]:
        """Exact NLL of the data under the model's weights, which are kept if they are the best; a line of the log.

        `weights` gives the whole weights by name; it is called by all processes or by none.

        The NLL is in nats per dimension, with the constant log(2 pi) / 2, as `mlx-starflow score` gives it, unless
        `unit` and `constant` say otherwise.

        Raises:
            StarflowError: the likelihood is not finite, or the weights cannot be written.
        """
        rng = np.random.default_rng([self.config.seed, 1])
        order = self.data.order
        found = np.zeros(order.count, np.float32)
        rows = max(1, self.config.batch_size // (self.config.accumulate * self.group.size()))
        piece = 0
        # Noise is drawn for whole batches, so that it is the same however many processes share them.
        for chosen in order.once(self.config.batch_size):
            arrays = self.data.arrays(chosen, rng, self.config, 1.0)
            arrays.pop("context_mask", None)
            for start in range(0, len(chosen), rows):
                part = slice(start, start + rows)
                # A model in shares needs all processes for each of its steps.
                if self.config.shard or piece % self.group.size() == self.group.rank():
                    nll = self.nll(model, {name: mx.array(array[part]) for name, array in arrays.items()})
                    found[chosen[part]] = np.array(nll.astype(mx.float32))
                piece += 1
        if self.group.size() > 1 and not self.config.shard:
            found = np.array(mx.distributed.all_sum(mx.array(found), group=self.group))
        values = found.astype(np.float64) + self.constant
        mean, error = float(values.mean()), standard_error(values)
        if not math.isfinite(mean):
            raise StarflowError(f"the validation likelihood is not finite at step {step}: try a lower learning rate")
        better = self.state["best"] is None or mean < self.state["best"]
        if better:
            self.state = {"best": mean, "step": step, "worse": 0}
            best = weights()
            if self.group.rank() == 0:
                write_arrays(self.folder / BEST, best, {"step": str(step), "nll": repr(mean)})
        else:
            self.state = {**self.state, "worse": self.state["worse"] + 1}
        spread = f" +- {error:.4f}" if math.isfinite(error) else ""  # one sample has none
        self._last = f"step {step}, validation {mean:.4f}{spread} {self.unit}" + (
            " (best)" if better else f" (best: {self.state['best']:.4f} at step {self.state['step']})"
        )
        if self.exhausted:
            self._last += f"; stopped early: no better one {self.state['worse']} times in a row"
        return {
            "step": step,
            "validation_nll": round(mean, 6),
            "standard_error": round(error, 6) if math.isfinite(error) else None,
            "best": better,
        }

    def best_weights(self, expected: Weights) -> Weights | None:
        """The weights that did best; None where there are none yet, and where this process cannot read them."""
        path = self.folder / BEST
        if not path.exists():
            return None
        weights = read_arrays(path)
        check_same(weights, expected, str(path))
        return weights
