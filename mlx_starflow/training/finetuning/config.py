"""How to fine-tune."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.precision import QUANTIZATIONS
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.finetuning.adapters import LAYERS, AdapterConfig


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
        batch_size: samples a step; 0: as many as fit into memory, at most 16.
        lr: highest learning rate; 0: 2e-3 for adapters, 1e-4 for all weights.
        caption_dropout: share of samples without their caption, for guidance.
        ema: decay of the average of the weights.
        context_full, context_partial: see `dropout.context_mask`; they make the flow heed the text more.
        anchor: share of each batch, up to a half, on which the tuned flow is held to the base, see `anchor`; 0: none.
        anchor_weight: of the KL divergence there, against the NLL on the rest.
        anchor_data: images whose likelihood is not to be forgotten, as `data` below; None: samples of the base.
        anchor_samples: how many of these are drawn, for captions of the new images.
        validation: share of the images that is held out and measured before and after; at most 100 of them.
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
    lr: float = 0.0
    caption_dropout: float = 0.1
    ema: float = 0.99
    context_full: float = 0.0
    context_partial: float = 0.0
    anchor: float = 0.0
    anchor_weight: float = 1.0
    anchor_data: str | None = None
    anchor_samples: int = 128
    validation: float = 0.1
    draws: int = 4
    samples: int = 8
    seed: int = 0
    save_seconds: float = 180.0
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "dora", "full"):
            raise StarflowError(f"finetune: kind must be lora, dora or full, not {self.kind!r}")
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
        self.training(max(self.batch_size, 1))
        if self.anchor and self.batch_size == 1:
            raise StarflowError("finetune: an anchor needs a batch size of 2 or more")
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

    def training(self, batch_size: int, checkpoint_layers: bool = False) -> TrainingConfig:
        """The settings of `Trainer`."""
        return TrainingConfig(
            steps=self.steps,
            batch_size=batch_size,
            checkpoint_layers=checkpoint_layers,
            lr=self.lr or (1e-4 if self.kind == "full" else 2e-3),
            weight_decay=0.0,
            ema=self.ema,
            caption_dropout=self.caption_dropout,
            context_full=self.context_full,
            context_partial=self.context_partial,
            seed=self.seed,
            save_seconds=self.save_seconds,
            log_every=self.log_every,
        )
