"""How to fine-tune."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked_class
from mlx_starflow.model_dir.precision import DTYPES, QUANTIZATIONS
from mlx_starflow.training.config import LEARNING_RATES, TrainingConfig
from mlx_starflow.training.finetuning.adapters import LAYERS, AdapterConfig


@checked_class
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        kind: "lora", "dora" or "full", all weights of the flow.
        rank, scale, dropout, layers, blocks: of adapters, see `AdapterConfig`; a rank of 0: 16, or less where memory is
            short.
        quantize: how to hold a dense base that an adapter is trained on: "none", as it is; one of `QUANTIZATIONS`; or
            "auto", as it is if that fits into memory, else in 8 bits, else "mixed".
        checkpoint_layers: compute layers again for the gradient; None: where memory asks for it.
        steps: optimizer steps.
        batch_size: samples a step; 0: as many as fit into memory, at most 16 for each of `accumulate` parts.
        accumulate, dtype: see `TrainingConfig`. Without a dtype networks compute in this machine's, and all weights,
            where they are trained, are float32.
        optimizer: see `TrainingConfig`.
        lr: highest learning rate; 0: 2e-3 for adapters with AdamW, 2e-2 with muon and sinkgd, a twentieth of these for
            all weights.
        caption_dropout: share of samples without their caption, for guidance.
        ema: decay of the average of the weights.
        context_full, context_partial: see `dropout.context_mask`; they make the flow heed the text more.
        anchor: share of each batch, up to a half, on which the tuned flow is held to the base, see `anchor`; 0: none.
        anchor_weight: of the KL divergence there, against the NLL on the rest.
        anchor_data: images whose likelihood is not to be forgotten, as `data` below; None: samples of the base.
        anchor_samples: how many of these are drawn, for captions of the new images.
        caption: of images that have none.
        validation: share of the images that is held out and measured before and after; at most 100 of them.
        validate_every, patience: see `TrainingConfig`; with validations the result is what did best in them.
        watch_every: steps between labelled grids of samples and images of the loss curve; 0: none.
        report_to: see `TrainingConfig`.
        draws: of the noise for that measurement.
        samples: images in the grid at the end.
        seed: of everything random.
        save_seconds, log_every: see `TrainingConfig`.
    """

    kind: str = "lora"
    rank: int = 0
    scale: float = 2.0
    dropout: float = 0.0
    layers: tuple[str, ...] = LAYERS
    blocks: str = "all"
    quantize: str = "auto"
    checkpoint_layers: bool | None = None
    steps: int = 400
    batch_size: int = 0
    accumulate: int = 1
    optimizer: str = "adamw"
    dtype: str | None = None
    lr: float = 0.0
    caption_dropout: float = 0.1
    ema: float = 0.99
    context_full: float = 0.0
    context_partial: float = 0.0
    anchor: float = 0.0
    anchor_weight: float = 1.0
    anchor_data: str | None = None
    anchor_samples: int = 128
    caption: str | None = None
    validation: float = 0.1
    validate_every: int = 0
    patience: int = 0
    watch_every: int = 0
    report_to: str | None = None
    draws: int = 4
    samples: int = 8
    seed: int = 0
    save_seconds: float = 180.0
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "dora", "full"):
            raise StarflowError(f"finetune: kind must be lora, dora or full, not {self.kind!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise StarflowError(f"finetune: dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.quantize not in ("auto", "none", *QUANTIZATIONS):
            known = ", ".join(("auto", "none", *QUANTIZATIONS))
            raise StarflowError(f"finetune: quantize must be one of {known}, not {self.quantize!r}")
        if self.kind == "full" and self.quantize not in ("auto", "none"):
            raise StarflowError("finetune: quantized weights cannot be trained; leave out --quantize or --full")
        if not 0 <= self.anchor <= 0.5:
            raise StarflowError(f"finetune: the anchor's share must be in 0..0.5, not {self.anchor}")
        if not 0 <= self.validation <= 0.5:
            raise StarflowError(f"finetune: validation must be in 0..0.5, not {self.validation}")
        for name in ("anchor_weight", "batch_size", "lr", "samples", "rank"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise StarflowError(f"finetune: {name} must be 0 or more, not {getattr(self, name)}")
        if self.rank > 1 << 16:
            raise StarflowError(f"finetune: rank must be at most {1 << 16}, not {self.rank}")
        for name in ("anchor_samples", "draws"):
            if getattr(self, name) < 1:
                raise StarflowError(f"finetune: {name} must be 1 or more, not {getattr(self, name)}")
        # What the trainer checks of its own is checked before any work too.
        self.training(self.batch_size or self.accumulate)
        if self.anchor and 0 < self.batch_size < 2 * self.accumulate:
            each = f" for each of {self.accumulate} parts" if self.accumulate > 1 else ""
            raise StarflowError(f"finetune: an anchor needs a batch size of 2 or more{each}")
        if self.validate_every and not self.validation:
            raise StarflowError("finetune: validate_every needs pictures to validate on: leave out --validation 0")
        if self.anchor_data and not self.anchor:
            raise StarflowError("finetune: anchor data is used with a share of the batch: give --anchor 0.25")

    def adapter(self, rank: int) -> AdapterConfig | None:
        """The adapter's config; None if all weights are trained."""
        if self.kind == "full":
            return None
        return AdapterConfig(
            kind=self.kind,
            rank=rank,
            scale=self.scale,
            dropout=self.dropout,
            layers=self.layers,
            blocks=self.blocks,
        )

    def training(self, batch_size: int, checkpoint_layers: bool = False, dtype: str | None = None) -> TrainingConfig:
        """The settings of `Trainer`, which has networks compute in `dtype` where that is not the weights' own."""
        return TrainingConfig(
            steps=self.steps,
            batch_size=batch_size,
            checkpoint_layers=checkpoint_layers,
            accumulate=self.accumulate,
            optimizer=self.optimizer,
            dtype=dtype,
            lr=self.lr or LEARNING_RATES.get(self.optimizer, 2e-3) / (20 if self.kind == "full" else 1),
            weight_decay=0.0,
            ema=self.ema,
            caption_dropout=self.caption_dropout,
            context_full=self.context_full,
            context_partial=self.context_partial,
            seed=self.seed,
            save_seconds=self.save_seconds,
            log_every=self.log_every,
            watch_every=self.watch_every,
            validate_every=self.validate_every,
            patience=self.patience,
            report_to=self.report_to,
        )
