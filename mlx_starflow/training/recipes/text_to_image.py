"""From captioned images to a text-to-image model: autoencoder, tokenizer, flow and text encoder."""

from __future__ import annotations

import base64
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.media.sources import write_skips
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.sampling.progress import Callback, Progress, Watch, watch
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.checkpoint import check_resume, is_anonymous
from mlx_starflow.training.loop.identity import digest
from mlx_starflow.training.loop.reporting import check_reporter
from mlx_starflow.training.loop.samples import caption_sheet, decode_latents, draw_latents
from mlx_starflow.training.loop.timing import describe_steps, random_batch, seconds_per_step
from mlx_starflow.training.loop.trainer import Trainer, forget
from mlx_starflow.training.loop.watch import SampleSheet
from mlx_starflow.training.loop.weights import assign
from mlx_starflow.training.output import check_model_output, claim_model
from mlx_starflow.training.recipes.autoencoder import autoencoder_step_time, encode_views, train_autoencoder
from mlx_starflow.training.recipes.presets import Preset
from mlx_starflow.training.recipes.text import (
    CaptionedLatents,
    TextFlow,
    fitting_length,
    initialize_text_encoder,
    train_tokenizer,
)


@checked
def train_model(
    data: str | Path,
    out: str | Path,
    preset: Preset,
    *,
    resume: bool = True,
    report: Callable[[str], None] = lambda line: None,
    begin: Callable[[], None] = lambda: None,
    caption: str | None = None,
    progress: Watch = None,
    callback: Callback | None = None,
) -> Path:
    """Train a text-to-image model and write it as a model directory that `mlx_starflow.load` reads.

    Args:
        data: captioned images, see `open_source`. Metadata may give further `captions` and a `split`: "train" (the
            default), "autoencoder" (the flow does not see it), "validation" (nothing is trained on it) or anything
            else (not used). Images that cannot be used are listed in `out/training/skipped.txt`.
        out: the model directory; checkpoints and logs are in `out/training`.
        preset: sizes and lengths; see `PRESETS`.
        resume: go on where an earlier run into `out` stopped; else start again.
        report: is told, in a line, what goes on.
        begin: is called on rank 0 when all that can be refused has been.
        caption: of images that have none.
        progress, callback: see `Progress`; its phases are "autoencoder", "encoding" and "flow", and cancelling a
            training saves it, as Ctrl-C does.

    With `mlx.launch` all processes do this together, and rank 0 alone writes and reports.

    Raises:
        StarflowError: the data cannot be used, a training diverges, or `out` holds the training of another model.
    """
    progress = watch(progress, callback)
    check_reporter(preset.flow_training.report_to)
    if distributed.world().rank() == 0:
        check_model_output(Path(out), "starflow", [data])
    with distributed.run_folder(Path(out)):
        return _train_model(data, Path(out), preset, resume, report, begin, caption, progress)


def _train_model(
    data: str | Path,
    out: Path,
    preset: Preset,
    resume: bool,
    report: Callable[[str], None],
    begin: Callable[[], None],
    caption: str | None,
    progress: Progress,
) -> Path:
    work = out / "training"
    group = distributed.world()
    first = group.rank() == 0
    say = report if first else lambda line: None
    # Twice the size, so that views are made smaller and not larger.
    splits = ("train", "autoencoder", "validation")
    images = ImageFolder.read(data, size=2 * preset.size, splits=splits, caption=caption)
    captioned, held_out = images.only("train"), images.only("validation")
    if not held_out and (preset.flow_training.validate_every or preset.flow_training.patience):
        raise StarflowError(
            f'{data} has nothing to validate on: give some lines of its metadata "split": "validation", '
            "or leave --validate-every and --patience out"
        )
    if first:
        write_skips(work / "skipped.txt", images.skipped)
    images = images.only("train", "autoencoder")
    with distributed.peers("train", group):
        tokenizer, spiece, length = _tokenizer(captioned, work, preset, resume, group)
    preset = replace(preset, flow={**preset.flow, "txt_size": length})
    say(f"{len(captioned)} pictures for the flow, {len(images)} for the autoencoder; {tokenizer.vocab_size} tokens")

    captions = [text for texts in captioned.captions for text in texts]
    if cut := sum(tokenizer.batch(captions, length)[2]):
        say(f"{cut} of {len(captions)} captions are cut: they are longer than {length} tokens (--text-length)")
    flow_config = preset.flow_config()
    text_config = preset.text_config(tokenizer.vocab_size)
    pictures = {"pictures": digest(images.checksums)}
    identity = {
        "flow": flow_config.to_dict(),
        "text encoder": text_config.to_dict(),
        "tokenizer": hashlib.sha256(spiece.read_bytes()).hexdigest() if first else "",
        "pictures": digest(captioned.checksums),
        "captions": digest(captioned.captions),
        "held-out pictures": digest(held_out.checksums, held_out.captions),
    }
    if first:
        claim_model(out)
        if not resume:
            # Before the autoencoder: whoever goes on after that must not find the flow of another one.
            forget(work / "flow")
        else:
            check_resume(work / "autoencoder", pictures, preset.autoencoder_training.seed)
            check_resume(work / "flow", identity, preset.flow_training.seed)
        begin()
    autoencoder = train_autoencoder(
        images.images,
        preset.autoencoder_config(),
        preset.autoencoder_training,
        work / "autoencoder",
        identity=pictures,
        resume=resume,
        progress=progress,
    )
    rng = np.random.default_rng(preset.flow_training.seed)
    latents = encode_views(autoencoder, captioned.images, preset.views, rng, progress=progress)
    mean, std = latents.mean(axis=(0, 1, 2, 3), dtype=np.float64), latents.std(axis=(0, 1, 2, 3), dtype=np.float64)
    std = np.maximum(std, 1e-6)  # a channel may be dead
    autoencoder.config = replace(autoencoder.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    say("autoencoder done; latents have std " + ", ".join(f"{value:.2f}" for value in std))

    mx.random.seed(preset.flow_training.seed)
    model = TextFlow(STARFlow(flow_config), T5Encoder(text_config))
    initialize_text_encoder(model.text_encoder)

    def samples(latents: np.ndarray, folder: ImageFolder) -> CaptionedLatents:
        tokens = (flow_config.img_size // flow_config.patch_size) ** 2
        normalized = ((latents - mean) / std).astype(np.float32)
        return CaptionedLatents(
            normalized, folder.captions, tokenizer, text_length=length, tokens=tokens, repeats=folder.repeats
        )

    validation = None
    if held_out:
        rng = np.random.default_rng(preset.flow_training.seed)
        views = encode_views(autoencoder, held_out.images, 1, rng, progress=progress)
        validation = samples(views, held_out)
    watched = held_out if held_out else captioned
    trainer = Trainer(
        model,
        samples(latents, captioned),
        preset.flow_training,
        work / "flow",
        loss=partial(TextFlow.loss, gradient_checkpointing=preset.flow_training.checkpoint_layers),
        nll=TextFlow.nll,
        validation=validation,
        samples=partial(
            draw_samples,
            autoencoder=autoencoder,
            tokenizer=tokenizer,
            captions=[texts[0] for texts in watched.captions[:4]],
        ),
        identity=identity,
        name="flow",
        resume=resume,
        progress=progress,
    )
    assign(model, trainer.run())
    if first:
        write_model(out, model, autoencoder, spiece, preset.pipeline)
    with distributed.peers("train", group):
        distributed.wait(group)
    say(f"wrote {out}")
    return out


def step_times(preset: Preset) -> list[str]:
    """How long the steps of both trainings take on this machine, a line each; some are done, on random data."""
    autoencoder = preset.autoencoder_training
    seconds = autoencoder_step_time(preset.autoencoder_config(), autoencoder)
    lines = [f"autoencoder: {describe_steps(seconds, autoencoder)}"]
    flow, training, text = preset.flow_config(), preset.flow_training, preset.text_config(preset.vocab_size)
    mx.random.seed(training.seed)
    batch = random_batch(flow, training.batch_size)
    ids = np.random.default_rng(0).integers(preset.vocab_size, size=batch.pop("text").shape[:2]).astype(np.int32)
    batch |= {"ids": ids, "mask": np.ones_like(ids)}
    model = TextFlow(STARFlow(flow), T5Encoder(text))
    loss = partial(TextFlow.loss, gradient_checkpointing=training.checkpoint_layers)
    return [*lines, f"flow: {describe_steps(seconds_per_step(model, batch, training, loss), training)}"]


def _tokenizer(
    captioned: ImageFolder, work: Path, preset: Preset, resume: bool, group: mx.distributed.Group
) -> tuple[Tokenizer, Path, int]:
    """The tokenizer, the same in all processes, where rank 0 keeps it, and the tokens of a caption."""
    spiece = work / "spiece.model"
    length = int(preset.flow["txt_size"])
    note = None
    if group.rank() == 0:
        if not resume:
            spiece.unlink(missing_ok=True)
        captions = [text for texts in captioned.captions for text in texts]
        tokenizer = train_tokenizer(captions, spiece, preset.vocab_size)
        # Versions before checkpoints had an identity always took the preset's length.
        if preset.fits_text and not (resume and is_anonymous(work / "flow")):
            length = fitting_length(captions, tokenizer, length)
        note = [base64.b64encode(spiece.read_bytes()).decode(), length]
    _, (content, length) = distributed.from_first({}, note, group)
    if group.rank():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "spiece.model"
            path.write_bytes(base64.b64decode(content))
            tokenizer = Tokenizer(path)
    return tokenizer, spiece, length


def draw_samples(
    model: TextFlow, *, autoencoder: AutoencoderKL, tokenizer: Tokenizer, captions: Sequence[str]
) -> SampleSheet:
    """Images of each caption."""
    config = model.flow.config
    ids, mask, _ = tokenizer.batch(captions, config.txt_size)
    text = model.text_encoder.encode(mx.array(ids), mx.array(mask))
    shape = (config.img_size, config.img_size, config.channel_size)
    return caption_sheet(decode_latents(autoencoder, draw_latents(model.flow, shape, text)), captions)


def write_model(
    out: Path,
    model: TextFlow,
    autoencoder: AutoencoderKL,
    spiece: Path,
    pipeline: dict[str, Any],
) -> None:
    """Write a model directory: the flow, `text_encoder/` with its tokenizer, and `vae/`."""
    flow_config: dict[str, Any] = {"model_type": "starflow", **model.flow.config.to_dict()}
    if pipeline:
        flow_config["pipeline"] = pipeline
    tokenizer = {"spiece.model": spiece.read_bytes()}
    encoder = model.text_encoder
    with transaction(out):
        save_model(out / "text_encoder", parameters(encoder), encoder.config.to_dict(), files=tokenizer)
        save_model(out / "vae", parameters(autoencoder), autoencoder.config.to_dict())
        save_model(out, parameters(model.flow), flow_config)
