"""Fine-tuning a model directory's flow on captioned images: adapters or all weights, anchored to the base or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood import Nll
from mlx_starflow.media.files import expanded, replacing
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.media.sources import open_source
from mlx_starflow.model_dir.adapters import FINGERPRINT
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.fingerprint import FUSED, fingerprint
from mlx_starflow.model_dir.saving import copy_parts, save_model
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.model_dir.weights import dtype_name, parameters
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.pipelines import load
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.planning.finetune_memory import Choice
from mlx_starflow.sampling.progress import Callback, Progress, Watch, watch
from mlx_starflow.training.data.batches import split_samples
from mlx_starflow.training.data.cache.build import CacheSettings, build_cache
from mlx_starflow.training.data.cache.files import is_cache
from mlx_starflow.training.data.cache.model import weights_digest
from mlx_starflow.training.data.cache.reading import CAPTIONED, CachedLatents, LatentCache
from mlx_starflow.training.finetuning.adapters import save_adapter
from mlx_starflow.training.finetuning.base import (
    batch_parts,
    computed_dtype,
    held_dtype,
    load_base,
    make_trainable,
    plan_finetune,
)
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.data import (
    AnchorImages,
    AnchorSamples,
    FinetuneData,
    cached_nll,
    finetune_loss,
    own_nll,
)
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.checkpoint import check_resume, checkpoint_files
from mlx_starflow.training.loop.identity import Identity, digest
from mlx_starflow.training.loop.reporting import check_reporter
from mlx_starflow.training.loop.samples import caption_drawer, first_captions
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign, trainable

MISFIT = 1.0
"""Nats per dimension by which pictures are less likely than the base's own samples where it fits them badly: the
density of every dimension is e times too low."""

OWN_SAMPLES = 4


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


def open_cache(
    data: str | Path,
    folder: Path,
    model: str | Path,
    report: Callable[[str], None],
    settings: CacheSettings | None = None,
    progress: Watch = None,
) -> LatentCache:
    """A cache for this model: `data` itself if it is one, else one made of it in `folder` (or gone on with).

    Of several processes the first makes it, and all of them wait for that.
    """
    if is_cache(expanded(data)):
        return LatentCache(expanded(data), model)

    def build() -> None:
        for line in build_cache(data, folder, model, settings, progress=progress).remarks():
            report(line)

    distributed.first_does(build, "finetune")
    return LatentCache(folder)


@checked
def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = True,
    report: Callable[[str], None] = lambda line: None,
    progress: Watch = None,
    callback: Callback | None = None,
) -> FinetuneResult:
    """Fine-tune a model's flow; autoencoder and text encoder stay as they are.

    Args:
        model: "demo", a model directory or a Hub repository of one.
        data: captioned images, see `open_source`, or a cache of them, see `build_cache`.
        out: folder of the run: `adapter/` (or, for "full", `model/`, dense), `grid.png`, `report.json`, `config.yaml`,
            and in `cache/` and `checkpoints/` what resuming needs. An adapter is there, and can be used, from the first
            checkpoint on.
        config: see there.
        resume: go on where an earlier run into `out` stopped; else start again.
        report: is told, in a line, what goes on.
        progress, callback: see `Progress`; its phases are those of `build_cache`, "scoring", "flow" and, for the
            training itself, "finetune", in whose steps cancelling saves, as Ctrl-C does.

    With `mlx.launch` all processes do this together; rank 0 alone writes, reports, and measures.

    Raises:
        StarflowError: a mistake in the arguments, or what `build_cache` and `Trainer` raise.
    """
    config, out, progress = config or FinetuneConfig(), Path(out), watch(progress, callback)
    check_reporter(config.report_to)
    check_outputs(folders=[out], inputs=[data])
    check_data(data, config)
    choice, _ = plan_finetune(model, config)
    say = report if distributed.world().rank() == 0 else _nobody
    say(str(choice))
    with distributed.run_folder(out):
        return _finetune(model, data, out, config, choice, resume, say, progress)


def check_data(data: str | Path, config: FinetuneConfig) -> None:
    """Raise StarflowError if `finetune` cannot begin with this data."""
    if not is_cache(expanded(data)):
        open_source(data, caption=config.caption)
    elif config.caption is not None:
        raise StarflowError(CAPTIONED.format(data))


def _nobody(line: str) -> None:
    pass


def _finetune(
    model: str | Path,
    data: str | Path,
    out: Path,
    config: FinetuneConfig,
    choice: Choice,
    resume: bool,
    report: Callable[[str], None],
    progress: Progress,
) -> FinetuneResult:
    first = distributed.world().rank() == 0
    cache = open_cache(data, out / "cache", model, report, CacheSettings(caption=config.caption), progress)
    images, held_out = split_samples(len(cache), config.validation, 100, config.seed)
    identity = _identity(ModelDirectory.find(model), config, choice, cache, held_out)
    begins = not (resume and checkpoint_files(out / "checkpoints"))

    def begin() -> None:
        if resume:
            check_resume(out / "checkpoints", identity, config.seed)
        _write(out / "config.yaml", yaml.safe_dump(_plain(model, data, out, config, choice), sort_keys=False))

    distributed.first_does(begin, "finetune")
    computed = computed_dtype(config)
    flow = load_base(model, choice.quantization, held_dtype(config))
    before = None
    if first and len(held_out):
        before = cached_nll(flow, cache, held_out, draws=config.draws, seed=config.seed, progress=progress)
        report(f"before: {before}")
        if begins and (misfit := _misfit(flow, cache, held_out, before, config.seed, progress)):
            report(misfit)
    anchor: AnchorImages | AnchorSamples | None = None
    if config.anchor_data:
        anchor = AnchorImages(open_cache(config.anchor_data, out / "anchor-cache", model, report, progress=progress))
    elif config.anchor:
        anchor = AnchorSamples.draw(flow, cache, images, config.anchor_samples, config.seed, progress)
    base = None
    if anchor and config.kind == "full":
        base = load_base(model, None, computed)
        base.freeze()
    make_trainable(flow, config, None, choice.rank)
    mx.eval(flow.parameters())
    parts = batch_parts(config)
    samples = FinetuneData(cache, images, flow.config.noise_std, anchor, config.anchor, config.dropout > 0, parts)
    loss = partial(
        finetune_loss, anchor_weight=config.anchor_weight, base=base, gradient_checkpointing=choice.checkpoint
    )
    other = config.dtype is not None or computed != held_dtype(config)
    training = config.training(choice.batch_size, choice.checkpoint, dtype_name(computed) if other else None)

    def publish(weights: Mapping[str, mx.array]) -> None:
        """Put the adapter where it can be used, as it is now."""
        held = trainable(flow)
        assign(flow, weights)
        try:
            _save(flow, model, out, config, choice)
        finally:
            assign(flow, held)

    shown = first_captions(cache, held_out if len(held_out) else images)
    settings = GenerationSettings.from_dict(ModelDirectory.find(model).pipeline)
    trainer = Trainer(
        flow,
        samples,
        training,
        out / "checkpoints",
        loss=loss,
        validation=CachedLatents(cache, held_out) if config.validate_every else None,
        samples=caption_drawer(cache, shown, model, settings) if config.watch_every else None,
        publish=None if config.kind == "full" else publish,
        identity=identity,
        name="finetune",
        resume=resume,
        progress=progress,
    )
    assign(flow, trainer.run())
    result = FinetuneResult(out / ("model" if config.kind == "full" else "adapter"), None, None)

    def finish() -> None:
        nonlocal result
        after = None
        if before:
            after = cached_nll(flow, cache, held_out, draws=config.draws, seed=config.seed, progress=progress)
        result = FinetuneResult(_save(flow, model, out, config, choice), before, after)
        _write(out / "report.json", json.dumps(result.report(), indent=2) + "\n")
        _draw_grid(model, out, cache, held_out if len(held_out) else images, config, result.folder, report, progress)

    distributed.first_does(finish, "finetune")
    return result


def _misfit(flow: STARFlow, cache: LatentCache, images: np.ndarray, before: Nll, seed: int, progress: Progress) -> str:
    """A line if the base fits the images badly, against samples of its own; "" if it does not."""
    own = own_nll(flow, cache, images, count=OWN_SAMPLES, seed=seed, progress=progress)
    if before.mean - own <= MISFIT:
        return ""
    return (
        f"the base fits these pictures badly: their NLL is {before.mean:.2f} nats per dimension, that of its own "
        f"samples {own:.2f}; it has much to learn, which takes more steps, and pictures may stay rough: "
        "a base that was trained on pictures like these is a better start"
    )


def _draw_grid(
    model: str | Path,
    out: Path,
    cache: LatentCache,
    shown: np.ndarray,
    config: FinetuneConfig,
    folder: Path,
    report: Callable[[str], None],
    progress: Progress,
) -> None:
    """Samples of the result, as its model makes them, in `out/grid.png`."""
    if config.samples:
        prompts = [cache.captions[index][0] for index in shown[: config.samples]]
        pipe = load(folder) if config.kind == "full" else load(model, adapters=[(folder, 1.0)])
        made = pipe.generate(prompts, seed=config.seed, verify=False, progress=progress)
        save_image(grid(made.images), out / "grid.png", pipe.grid_metadata(made))
        report(f"{out / 'grid.png'}: {', '.join(prompts)}; seed {config.seed}")


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
        dtype = computed_dtype(config)
        weights = {name: array.astype(dtype) for name, array in parameters(flow).items()}
        return save_model(out / "model", weights, settings, files=files)


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
