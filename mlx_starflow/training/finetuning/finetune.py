"""Fine-tuning a model directory's flow on captioned images: adapters or all weights, anchored to the base or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.likelihood import Nll
from mlx_starflow.media.files import expanded, replacing
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.media.sources import open_source
from mlx_starflow.model_dir.adapters import FINGERPRINT
from mlx_starflow.model_dir.directory import ModelDirectory, load_flow
from mlx_starflow.model_dir.fingerprint import FUSED, fingerprint
from mlx_starflow.model_dir.quantization import dequantize_module, quantize_module, quantized_layers
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.model_dir.weights import parameters, training_dtype
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.pipelines import load
from mlx_starflow.planning.finetune_memory import BATCH_SIZES, PRECISIONS, RANKS, Choice, Planner
from mlx_starflow.planning.memory import available
from mlx_starflow.training.data.batches import split_samples
from mlx_starflow.training.data.cache.build import CacheSettings, build_cache
from mlx_starflow.training.data.cache.files import is_cache
from mlx_starflow.training.data.cache.model import weights_digest
from mlx_starflow.training.data.cache.reading import LatentCache
from mlx_starflow.training.finetuning.adapters import attach, save_adapter
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.data import (
    AnchorImages,
    AnchorSamples,
    FinetuneData,
    cached_nll,
    finetune_loss,
)
from mlx_starflow.training.finetuning.fuse import copy_parts
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.checkpoint import check_resume
from mlx_starflow.training.loop.identity import Identity, digest
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign


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
    planner = finetune_planner(lambda: _lazy_flow(directory, training_dtype()), config)
    memory = available() if memory is None else memory
    choice = planner.choose(memory)
    if choice is None:
        raise StarflowError(
            f"fine-tuning {model} does not fit into this machine's memory ({memory / 2**30:.1f} GiB): "
            "train fewer --blocks, with a smaller --batch-size" + (" or an adapter" if config.kind == "full" else "")
        )
    return choice, finetune_planner(lambda: _lazy_flow(directory, mx.bfloat16), config).macs()


def finetune_planner(make_flow: Callable[[], STARFlow], config: FinetuneConfig) -> Planner:
    """The planner of a fine-tuning; `make_flow` makes the base, whose numbers are not computed."""

    def trained(quantization: str | None, rank: int) -> STARFlow:
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


def _lazy_flow(model: ModelDirectory, dtype: mx.Dtype) -> STARFlow:
    """A model directory's flow; each tensor is read when it is computed with."""
    if not model.reads_prompts:
        raise StarflowError(f"{model.path} does not read captions: fine-tuning is for models of latents and prompts")
    flow = model.flow.lazy()
    assert isinstance(flow, STARFlow)  # no other flow reads prompts
    flow.set_dtype(dtype)
    return flow


def _load_base(model: str | Path, quantization: str | None) -> STARFlow:
    """A model's flow, quantized if need be; its dense weights are never in memory all at once."""
    if quantization is None:
        dense = load_flow(model)
        assert isinstance(dense, STARFlow)
        return dense
    flow = _lazy_flow(ModelDirectory.find(model), training_dtype())
    quantize_module(flow, quantization)
    for array in parameters(flow).values():
        mx.eval(array)
    return flow


def _make_trainable(flow: STARFlow, config: FinetuneConfig, quantization: str | None, rank: int) -> None:
    if quantization is not None:
        quantize_module(flow, quantization)
    if adapter := config.adapter(rank):
        attach(flow, adapter, config.seed)
    else:
        dequantize_module(flow)
        flow.unfreeze()


def open_cache(data: str | Path, folder: Path, model: str | Path, report: Callable[[str], None]) -> LatentCache:
    """A cache for this model: `data` itself if it is one, else one made of it in `folder` (or gone on with)."""
    if is_cache(expanded(data)):
        return LatentCache(expanded(data), model)
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
        data: captioned images, see `open_source`, or a cache of them, see `build_cache`.
        out: folder of the run: `adapter/` (or, for "full", `model/`, dense), `grid.png`, `report.json`, `config.yaml`,
            and in `cache/` and `checkpoints/` what resuming needs.
        config: see there.
        resume: go on where an earlier run into `out` stopped; else start again.
        report: is told, in a line, what goes on.

    Raises:
        StarflowError: a mistake in the arguments, or what `build_cache` and `Trainer` raise.
    """
    config, out = config or FinetuneConfig(), Path(out)
    check_outputs(folders=[out], inputs=[data])
    if not is_cache(expanded(data)):
        open_source(data)
    choice, _ = plan_finetune(model, config)
    report(str(choice))
    with distributed.run_folder(out):
        return _finetune(model, data, out, config, choice, resume, report)


def _finetune(
    model: str | Path,
    data: str | Path,
    out: Path,
    config: FinetuneConfig,
    choice: Choice,
    resume: bool,
    report: Callable[[str], None],
) -> FinetuneResult:
    cache = open_cache(data, out / "cache", model, report)
    images, held_out = split_samples(len(cache), config.validation, 100, config.seed)
    identity = _identity(ModelDirectory.find(model), config, choice, cache, held_out)
    if resume:
        check_resume(out / "checkpoints", identity, config.seed)
    _write(out / "config.yaml", yaml.safe_dump(_plain(model, data, out, config, choice), sort_keys=False))
    flow = _load_base(model, choice.quantization)
    before = cached_nll(flow, cache, held_out, draws=config.draws, seed=config.seed) if len(held_out) else None
    if before:
        report(f"before: {before}")
    anchor: AnchorImages | AnchorSamples | None = None
    if config.anchor_data:
        anchor = AnchorImages(open_cache(config.anchor_data, out / "anchor-cache", model, report))
    elif config.anchor:
        anchor = AnchorSamples.draw(flow, cache, images, config.anchor_samples, config.seed)
    base = None
    if anchor and config.kind == "full":
        base = _load_base(model, None)
        base.freeze()
    _make_trainable(flow, config, None, choice.rank)
    mx.eval(flow.parameters())
    samples = FinetuneData(cache, images, flow.config.noise_std, anchor, config.anchor, config.dropout > 0)
    loss = partial(
        finetune_loss, anchor_weight=config.anchor_weight, base=base, gradient_checkpointing=choice.checkpoint
    )
    training = config.training(choice.batch_size, choice.checkpoint)
    trainer = Trainer(
        flow, samples, training, out / "checkpoints", loss=loss, identity=identity, name="finetune", resume=resume
    )
    assign(flow, trainer.run())
    after = cached_nll(flow, cache, held_out, draws=config.draws, seed=config.seed) if before else None
    folder = _save(flow, model, out, config, choice)
    result = FinetuneResult(folder, before, after)
    _write(out / "report.json", json.dumps(result.report(), indent=2) + "\n")
    if config.samples:
        shown = held_out if len(held_out) else images
        prompts = [cache.captions[index][0] for index in shown[: config.samples]]
        pipe = load(folder) if config.kind == "full" else load(model, adapters=[(folder, 1.0)])
        made = pipe.generate(prompts, seed=config.seed, verify=False)
        save_image(grid(made.images), out / "grid.png", pipe.grid_metadata(made))
        report(f"{out / 'grid.png'}: {', '.join(prompts)}; seed {config.seed}")
    return result


def _identity(
    model: ModelDirectory, config: FinetuneConfig, choice: Choice, cache: LatentCache, held_out: np.ndarray
) -> Identity:
    """What checkpoints are of: the base and how it is held, the kind of change, the data and its split."""
    change: dict[str, Any] = {"kind": config.kind}
    if adapter := config.adapter(choice.rank):
        # Dropout is of the training alone.
        change = {name: value for name, value in asdict(adapter).items() if name != "dropout"}
    return {
        "flow": {name: value for name, value in model.flow.content.items() if name != "pipeline"},
        "base model": weights_digest(model.path),
        "quantization": choice.quantization or "none",
        "adapter": change,
        "pictures": digest(cache.checksums),
        "held-out pictures": digest(held_out.tolist()),
    }


def _save(flow: STARFlow, model: str | Path, out: Path, config: FinetuneConfig, choice: Choice) -> Path:
    if adapter := config.adapter(choice.rank):
        about = {"model": str(model), FINGERPRINT: fingerprint(ModelDirectory.find(model).path)}
        if choice.quantization:
            about["base_quantized_to"] = choice.quantization
        return save_adapter(out / "adapter", flow, adapter, about)
    source = ModelDirectory.find(model)
    left_out = ("quantization", FUSED)
    settings = {key: value for key, value in source.flow.content.items() if key not in left_out}
    with transaction(out / "model"):
        files = copy_parts(source, out / "model")
        return save_model(out / "model", parameters(flow), settings, files=files)


def _plain(model: str | Path, data: str | Path, out: Path, config: FinetuneConfig, choice: Choice) -> dict[str, Any]:
    """The effective config, as `finetune --config` reads it."""
    known = asdict(config)
    del known["kind"], known["rank"]
    return {
        "model": str(model),
        "data": str(data),
        "output": str(out),
        **({"full": True} if config.kind == "full" else {config.kind: choice.rank}),
        **known,
        "layers": list(config.layers),
        "quantize": choice.quantization or "none",
        "checkpoint_layers": choice.checkpoint,
        "batch_size": choice.batch_size,
        "lr": config.training(choice.batch_size).lr,
    }


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StarflowError(f"{path.parent} cannot be made: {one_line(error)}") from None
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
