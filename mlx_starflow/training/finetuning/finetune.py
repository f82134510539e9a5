"""Fine-tuning a model directory's flow on captioned pictures: adapters or all weights, anchored to the base or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.likelihood import Nll
from mlx_starflow.media.files import replacing
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.media.sources import open_source
from mlx_starflow.model_dir.directory import ModelDirectory, load_flow
from mlx_starflow.model_dir.quantization import QUANTIZATIONS, dequantize_module, quantize_module, quantized_layers
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import default_dtype, parameters
from mlx_starflow.pipelines import load
from mlx_starflow.planning.finetune_memory import BATCH_SIZES, PRECISIONS, RANKS, Choice, Planner
from mlx_starflow.planning.memory import available
from mlx_starflow.training.data.cache_build import CacheSettings, build_cache
from mlx_starflow.training.data.cache_files import MANIFEST
from mlx_starflow.training.data.latent_cache import LatentCache
from mlx_starflow.training.finetuning.adapters import LAYERS, AdapterConfig, attach, save_adapter
from mlx_starflow.training.finetuning.data import (
    AnchorPictures,
    AnchorSamples,
    FinetuneData,
    cached_nll,
    finetune_loss,
    split_pictures,
)
from mlx_starflow.training.finetuning.fuse import copy_parts
from mlx_starflow.training.loop.config import TrainingConfig
from mlx_starflow.training.loop.schedules import assign
from mlx_starflow.training.loop.trainer import Trainer


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
        context_full, context_partial: see `objective.context_keep`; they make the flow heed the text more.
        anchor: share of each batch, up to a half, on which the tuned flow is held to the base, see `anchor`; 0: none.
        anchor_weight: of the KL divergence there, against the NLL on the rest.
        anchor_data: pictures whose likelihood is not to be forgotten, as `data` below; None: samples of the base.
        anchor_samples: how many of these are drawn, for captions of the new pictures.
        validation: share of the pictures that is held out and measured before and after; at most 100 of them.
        draws: of the noise for that measurement.
        samples: pictures in the grid at the end.
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
            if getattr(self, name) < 0:
                raise StarflowError(f"finetune: {name} must be 0 or more, not {getattr(self, name)}")
        for name in ("anchor_samples", "draws"):
            if getattr(self, name) < 1:
                raise StarflowError(f"finetune: {name} must be 1 or more, not {getattr(self, name)}")
        if self.anchor and self.batch_size == 1:
            raise StarflowError("finetune: an anchor needs a batch size of 2 or more")
        if self.anchor_data and not self.anchor:
            raise StarflowError("finetune: anchor data is used with a share of the batch: give --anchor 0.25")

    def adapter(self, rank: int) -> AdapterConfig | None:
        """The adapter's config; None if all weights are trained."""
        if self.kind == "full":
            return None
        names = ("kind", "scale", "dropout", "layers", "blocks")
        return AdapterConfig(rank=rank, **{name: getattr(self, name) for name in names})

    def training(self, batch_size: int, checkpoint_layers: bool = False) -> TrainingConfig:
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


@dataclass(frozen=True)
class FinetuneResult:
    """What a run ends with: the folder to use (an adapter's or a model's), and NLL of held-out pictures, if any."""

    folder: Path
    before: Nll | None
    after: Nll | None

    def report(self) -> dict[str, Any]:
        """Nats per dimension: before, after, and the paired change with its standard error."""
        if self.before is None or self.after is None:
            return {}
        change = self.after - self.before
        return {
            "pictures": len(change.prior),
            "before": self.before.mean,
            "after": self.after.mean,
            "change": change.mean,
            "standard_error": change.standard_error,
        }

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"{self.folder}: done"
        change = self.after - self.before
        return (
            f"{self.folder}: held-out NLL {self.before.mean:.4f} -> {self.after.mean:.4f}, "
            f"{change.mean:+.4f} +- {change.standard_error:.4f} nats per dimension ({len(change.prior)} pictures)"
        )


def plan_finetune(model: str | Path, config: FinetuneConfig, memory: float | None = None) -> tuple[Choice, str]:
    """What `finetune` will do in `memory` bytes (None: those of this machine), and what it would do on some Macs.

    Nothing but the headers of the weights is read. Raises StarflowError, also if nothing fits.
    """
    directory = ModelDirectory.find(model)
    planner = finetune_planner(lambda: _lazy_flow(directory, default_dtype()), config)
    memory = available() if memory is None else memory
    choice = planner.choose(memory)
    if choice is None:
        raise StarflowError(
            f"fine-tuning {model} does not fit into this machine's memory ({memory / 2**30:.1f} GiB): "
            "train fewer --blocks, with a smaller --batch-size" + (" or an adapter" if config.kind == "full" else "")
        )
    return choice, finetune_planner(lambda: _lazy_flow(directory, mx.bfloat16), config).macs()


def finetune_planner(make_flow: Callable[[], Any], config: FinetuneConfig) -> Planner:
    """The planner of a fine-tuning; `make_flow` makes the base, whose numbers are not computed."""

    def trained(quantization: str | None, rank: int) -> Any:
        flow = make_flow()
        _make_trainable(flow, config, quantization, rank)
        return flow

    adapters = config.kind != "full"
    precisions: tuple[str | None, ...] = (None,)
    if adapters and config.quantize == "auto" and not quantized_layers(make_flow()):
        precisions = PRECISIONS
    elif config.quantize not in ("auto", "none"):
        precisions = (config.quantize,)
    sizes = [size for size in BATCH_SIZES if size > 1 or not config.anchor]
    return Planner(
        trained,
        precisions=precisions,
        ranks=(0,) if not adapters else (config.rank,) if config.rank else RANKS,
        batch_sizes=[config.batch_size] if config.batch_size else sizes,
        checkpoint=config.checkpoint_layers,
        copy=bool(config.anchor) and not adapters,
        average=config.ema > 0,
    )


def _lazy_flow(model: ModelDirectory, dtype: mx.Dtype) -> Any:
    """A model directory's flow; each tensor is read when it is computed with."""
    if not model.reads_prompts:
        raise StarflowError(f"{model.path} does not read captions: fine-tuning is for models of latents and prompts")
    flow = model.flow.lazy()
    flow.set_dtype(dtype)
    return flow


def _load_base(model: str | Path, quantization: str | None) -> Any:
    """A model's flow, quantized if need be; its dense weights are never in memory all at once."""
    if quantization is None:
        return load_flow(model)
    flow = _lazy_flow(ModelDirectory.find(model), default_dtype())
    quantize_module(flow, quantization)
    for array in parameters(flow).values():
        mx.eval(array)
    return flow


def _make_trainable(flow: Any, config: FinetuneConfig, quantization: str | None, rank: int) -> None:
    if quantization is not None:
        quantize_module(flow, quantization)
    if adapter := config.adapter(rank):
        attach(flow, adapter, config.seed)
    else:
        dequantize_module(flow)
        flow.unfreeze()


def open_cache(data: str | Path, folder: Path, model: str | Path, report: Callable[[str], None]) -> LatentCache:
    """A cache for this model: `data` itself if it is one, else one made of it in `folder` (or gone on with)."""
    if (Path(data).expanduser() / MANIFEST).is_file():
        return LatentCache(Path(data).expanduser(), model)
    summary = build_cache(data, folder, model, CacheSettings())
    if summary.skipped:
        report(summary.skipped)
    return LatentCache(folder)


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> FinetuneResult:
    """Fine-tune a model's flow; autoencoder and text encoder stay as they are.

    Args:
        model: "demo", a model directory or a Hub repository of one.
        data: captioned pictures, see `open_source`, or a cache of them, see `build_cache`.
        out: folder of the run: `adapter/` (or, for "full", `model/`, dense), `grid.png`, `report.json`, `config.yaml`,
            and in `cache/` and `checkpoints/` what resuming needs.
        config: see there.
        resume: go on where an earlier run into `out` stopped; else start again.
        report: is told, in a line, what goes on.

    Raises:
        StarflowError: a mistake in the arguments, or what `build_cache` and `Trainer` raise.
    """
    config, out = config or FinetuneConfig(), Path(out)
    if not (Path(data).expanduser() / MANIFEST).is_file():
        open_source(data)
    choice, _ = plan_finetune(model, config)
    report(str(choice))
    _write(out / "config.yaml", yaml.safe_dump(_plain(model, data, out, config, choice), sort_keys=False))
    cache = open_cache(data, out / "cache", model, report)
    pictures, held_out = split_pictures(len(cache), config.validation, 100, config.seed)
    flow = _load_base(model, choice.quantization)
    before = cached_nll(flow, cache, held_out, draws=config.draws, seed=config.seed) if len(held_out) else None
    if before:
        report(f"before: {before}")
    anchor: AnchorPictures | AnchorSamples | None = None
    if config.anchor_data:
        anchor = AnchorPictures(open_cache(config.anchor_data, out / "anchor-cache", model, report))
    elif config.anchor:
        anchor = AnchorSamples.draw(flow, cache, pictures, config.anchor_samples, config.seed)
    base = None
    if anchor and config.kind == "full":
        base = load_flow(model)
        base.freeze()
    _make_trainable(flow, config, None, choice.rank)
    mx.eval(flow.parameters())
    samples = FinetuneData(cache, pictures, flow.config.noise_std, anchor, config.anchor, config.dropout > 0)
    loss = partial(finetune_loss, anchor_weight=config.anchor_weight, base=base, checkpoint=choice.checkpoint)
    training = config.training(choice.batch_size, choice.checkpoint)
    trainer = Trainer(flow, samples, training, out / "checkpoints", loss=loss, name="finetune", resume=resume)
    assign(flow, trainer.run())
    after = cached_nll(flow, cache, held_out, draws=config.draws, seed=config.seed) if before else None
    folder = _save(flow, model, out, config, choice)
    result = FinetuneResult(folder, before, after)
    _write(out / "report.json", json.dumps(result.report(), indent=2) + "\n")
    if config.samples:
        shown = held_out if len(held_out) else pictures
        prompts = [cache.captions[index][0] for index in shown[: config.samples]]
        pipe = load(folder) if config.kind == "full" else load(model, adapters=[(folder, 1.0)])
        made = pipe.generate(prompts, seed=config.seed, verify=False)
        save_image(grid(made.images), out / "grid.png", pipe.grid_metadata(made))
        report(f"{out / 'grid.png'}: {', '.join(prompts)}; seed {config.seed}")
    return result


def _save(flow: Any, model: str | Path, out: Path, config: FinetuneConfig, choice: Choice) -> Path:
    if adapter := config.adapter(choice.rank):
        about = {"model": str(model)}
        if choice.quantization:
            about["base_quantized_to"] = choice.quantization
        return save_adapter(out / "adapter", flow, adapter, about)
    source = ModelDirectory.find(model)
    settings = {key: value for key, value in source.flow.content.items() if key != "quantization"}
    files = copy_parts(source, out / "model")
    return save_model(out / "model", parameters(flow), settings, files=files)


def _plain(model: str | Path, data: str | Path, out: Path, config: FinetuneConfig, choice: Choice) -> dict[str, Any]:
    """The effective config, as `finetune --config` reads it."""
    settings = {**asdict(config), **asdict(config.training(choice.batch_size, choice.checkpoint))}
    known = {key: settings[key] for key in asdict(config)}
    kind = known.pop("kind")
    known.pop("rank")
    how = {"full": True} if kind == "full" else {kind: choice.rank}
    known |= {"layers": list(config.layers), "quantize": choice.quantization or "none"}
    return {"model": str(model), "data": str(data), "output": str(out), **how, **known}


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StarflowError(f"{path.parent} cannot be made: {one_line(error)}") from None
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
