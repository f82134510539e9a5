"""How a training is done: all its settings, and those of them that somebody asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.precision import DTYPES
from mlx_starflow.models.configs import plain_fields

OPTIMIZERS = ("adamw", "adafactor", "muon", "sinkgd")

LEARNING_RATES = {"muon": 2e-2, "sinkgd": 2e-2}
"""Highest learning rates of optimizers whose unit is not AdamW's, unless somebody asks for another; see
`examples/reports/optimizers.py`."""


LEVEL_SAMPLINGS = ("uniform", "square")
"""How noise levels are drawn, see `TrainingConfig`."""

LEVEL_WEIGHTS = ("1", "t", "t/(t0+t1)", "t^2")
"""How the loss at a noise level counts, see `TrainingConfig`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: optimizer steps of the whole training.
        batch_size: samples a step, those of all micro-batches and of all processes together.
        accumulate: micro-batches that a step's batch is split into; more of them take less memory.
        lr: highest learning rate.
        warm_up: share of the steps over which the learning rate rises; a cosine takes it down after that.
        optimizer: see `optimizers.GroupedOptimizer`.
        betas, weight_decay: AdamW's; the other optimizers take the decay too, and Adam's betas for their vectors.
        embedding_factor: the text embedding learns this much faster.
        clip: largest global norm of the gradient.
        skip: a step whose gradient's norm is larger than this changes nothing; 0: none is skipped.
        ema: decay of the moving average of the weights; 0 is no average, which takes less memory.
        dtype: what networks compute in. With one given, the trained weights are kept in float32, whatever they were;
            None: both are as the weights were.
        checkpoint_layers: gradient checkpointing: compute layers again instead of keeping what they computed.
        noise_std: standard deviation of the noise on the latents.
        level_sampling: how an iTARFlow's noise levels t are drawn between its lowest and its highest one: "uniform" t,
            or uniform "square", t^2.
        level_weight: weight of a sample in an iTARFlow's loss: "1", "t", "t/(t0+t1)" or "t^2".
        caption_dropout: share of samples that are trained without their caption, for guidance.
        context_full, context_partial: see `dropout.context_mask`; the first falls late in training.
        seed: of everything random.
        save_seconds, save_steps: a checkpoint is written that often, by time and by steps (0: by time alone).
        log_every: steps between lines of the log.
        watch_every: steps between sample grids and images of the loss curve; 0: none.
        validate_every: steps between validations, where there is data for it; 0: none.
        patience: so many validations in a row without a better one end the training; 0: none do.
        shard: keep a share of every large weight in each process; needs a backend other than ring.
    """

    steps: int
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    warm_up: float = 0.02
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    embedding_factor: float = 8.0
    clip: float = 1.0
    skip: float = 0.0
    ema: float = 0.999
    dtype: str | None = None
    checkpoint_layers: bool = False
    noise_std: float = 0.3
    level_sampling: str = "uniform"
    level_weight: str = "t"
    caption_dropout: float = 0.1
    context_full: float = 0.5
    context_partial: float = 0.3
    seed: int = 0
    save_seconds: float = 180.0
    save_steps: int = 0
    log_every: int = 50
    watch_every: int = 0
    validate_every: int = 0
    patience: int = 0
    shard: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("steps", "batch_size", "accumulate", "lr", "clip", "embedding_factor", "log_every"):
            self._require(name, "greater than 0", lambda value: value > 0)
        counts = ("seed", "save_seconds", "save_steps", "watch_every", "validate_every", "patience")
        for name in ("noise_std", "weight_decay", "skip", *counts):
            self._require(name, "0 or more", lambda value: value >= 0)
        self._require("seed", "less than 2^63", lambda value: value < 2**63)
        for name in ("warm_up", "ema"):
            self._require(name, "in 0..1, less than 1", lambda value: 0 <= value < 1)
        for name in ("caption_dropout", "context_full", "context_partial"):
            self._require(name, "in 0..1", lambda value: 0 <= value <= 1)
        self._require("betas", "two numbers in 0..1, less than 1", lambda b: len(b) == 2 and 0 <= min(b) <= max(b) < 1)
        self._require("optimizer", f"one of {', '.join(OPTIMIZERS)}", OPTIMIZERS.__contains__)
        for name, known in (("level_sampling", LEVEL_SAMPLINGS), ("level_weight", LEVEL_WEIGHTS)):
            self._require(name, f"one of {', '.join(known)}", known.__contains__)
        self._require("dtype", f"one of {', '.join(DTYPES)}", lambda value: value is None or value in DTYPES)
        self._require(
            "patience",
            "0 where there is no validation (validate_every)",
            lambda value: not value or self.validate_every > 0,
        )
        self._require(
            "accumulate", f"a divisor of batch_size {self.batch_size}", lambda value: self.batch_size % value == 0
        )

    def _require(self, name: str, what: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        try:
            good = holds(value)
        except TypeError:
            good = False
        if not good:
            raise StarflowError(f"training: {name} must be {what}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The settings of a `TrainingConfig` that somebody asks for; None leaves one to a preset or a recipe."""

    steps: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    lr: float | None = None
    warm_up: float | None = None
    optimizer: str | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    embedding_factor: float | None = None
    clip: float | None = None
    skip: float | None = None
    ema: float | None = None
    dtype: str | None = None
    checkpoint_layers: bool | None = None
    noise_std: float | None = None
    level_sampling: str | None = None
    level_weight: str | None = None
    caption_dropout: float | None = None
    context_full: float | None = None
    context_partial: float | None = None
    seed: int | None = None
    save_seconds: float | None = None
    save_steps: int | None = None
    log_every: int | None = None
    watch_every: int | None = None
    validate_every: int | None = None
    patience: int | None = None
    shard: bool | None = None

    def given(self) -> dict[str, Any]:
        """Those that are asked for, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def over(self, config: TrainingConfig) -> TrainingConfig:
        """`config` with these settings instead of its own.

        With another optimizer and no learning rate it is that of `LEARNING_RATES`, and embeddings, which AdamW trains
        in any case, learn as fast as before.

        Raises:
            StarflowError: the settings do not fit together.
        """
        known: dict[str, Any] = {}
        if self.lr is None and self.optimizer != config.optimizer and self.optimizer in LEARNING_RATES:
            known["lr"] = LEARNING_RATES[self.optimizer]
            known["embedding_factor"] = config.embedding_factor * config.lr / known["lr"]
        return replace(config, **{**known, **self.given()})
