"""Fine-tuning a model's decoder, alone: pictures from latents that still carry some of the flow's noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow.convert.common import open_tensors
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.files import exists
from mlx_starflow.media.image_files import find_images
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.media.pixels import crop_image, scale_pixels
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.saving import copy_network, read_notes, save_model
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.model_dir.weights import load_module
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.autoencoder_layers import GroupNorm
from mlx_starflow.models.perceptual import VGG16, feature_distance
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.trees import flattened
from mlx_starflow.planning.limits import check_held
from mlx_starflow.sampling.progress import Callback, Watch, watch
from mlx_starflow.training.config import TrainingConfig, TrainingOptions
from mlx_starflow.training.data.batches import Order, TrainingData, split_samples
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.checkpoint import check_resume, checkpoint_files
from mlx_starflow.training.loop.identity import digest
from mlx_starflow.training.loop.objective import Batch, Metrics
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign

TRAINED = ("decoder.", "post_quant_conv.")
"""How the names of the autoencoder's tensors begin that are trained."""

STEPS, BATCH_SIZE, LEARNING_RATE = 2000, 8, 1e-4
"""Of a training, if nobody says."""

PERCEPTUAL, ADVERSARIAL = 0.5, 0.02
"""Weights of these terms beside the L1 distance."""

MOST_HELD_OUT = 100


@dataclass(frozen=True)
class DecoderQuality:
    """How near pictures are that are decoded from latents with noise.

    Attributes:
        noise: its standard deviation, in normalized latents.
        decibels: peak signal-to-noise ratio, of the mean squared error over all pictures.
        distance: in the features of the training, mean over pictures.
    """

    noise: float
    decibels: float
    distance: float

    def __str__(self) -> str:
        return f"noise {self.noise:.2f}: {self.decibels:.2f} dB, distance {self.distance:.4f}"


@dataclass(frozen=True)
class DecoderReport:
    """Qualities of held-out pictures, or of all where none is held out, without noise and with the most that is
    trained on, before and after."""

    before: tuple[DecoderQuality, ...]
    after: tuple[DecoderQuality, ...]


class Discriminator(nn.Module):
    """Which parts of a picture look real (PatchGAN, arXiv 1611.07004): `[B, H, W, 3]` to logits `[B, h, w]`."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.convs = [
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        ]
        self.norms = [GroupNorm(8, 2 * width), GroupNorm(8, 4 * width)]
        self.conv_out = nn.Conv2d(4 * width, 1, 3, padding=1)

    def __call__(self, images: mx.array) -> mx.array:
        x = nn.leaky_relu(self.conv_in(images), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)[..., 0]


class DecoderTraining(nn.Module):
    """An autoencoder whose decoder is trained, its opponent, and what tells how different pictures look.

    Attributes:
        vae, discriminator: see there.
        vgg: a network for the perceptual distance; None: the autoencoder's own encoder.
    """

    def __init__(self, vae: AutoencoderKL, vgg: VGG16 | None = None):
        super().__init__()
        self.vae, self.discriminator = vae, Discriminator()
        self.vgg = vgg
        self.freeze()
        self.vae.decoder.unfreeze()
        if "post_quant_conv" in self.vae:
            self.vae.post_quant_conv.unfreeze()
        self.discriminator.unfreeze()

    def decode(self, images: mx.array, noise: mx.array) -> mx.array:
        """Pictures `[B, H, W, 3]` in -1..1 through normalized latents to which noise is added."""
        mean = mx.stop_gradient(self.vae.encode(images).mean)
        latents = self.vae.unscale(self.vae.scale(mean) + noise)
        return self.vae.decode(latents, tile_rows=0).astype(mx.float32)

    def distance(self, images: mx.array, made: mx.array) -> mx.array:
        """How different they look, `[B]`."""
        if self.vgg is not None:
            return feature_distance(self.vgg(images), self.vgg(made), self.vgg.lin)
        return feature_distance(self.vae.encoder.stages(images), self.vae.encoder.stages(made))

    def judged(self, images: mx.array) -> mx.array:
        """The discriminator's logits, as a judgement that its own weights do not learn from."""
        own = self.discriminator.parameters()
        held = [(name, mx.stop_gradient(weight)) for name, weight in flattened(own)]
        try:
            assign(self.discriminator, dict(held))
            return self.discriminator(images)
        finally:
            self.discriminator.update(own)


def decoder_loss(model: DecoderTraining, batch: Batch) -> tuple[mx.array, Metrics]:
    """L1, the perceptual distance, and an adversarial game (hinge loss) from `adversarial` = 1 on.

    Decoder and discriminator learn in one step, each from its own terms: the discriminator's see pictures that the
    decoder does not learn from, and the decoder's a judgement that the discriminator does not learn from.

    `batch` has `images` `[B, H, W, 3]` in -1..1, `noise` `[B, h, w, C]` in normalized latents, and `adversarial` `[B]`.
    """
    images = batch["images"]
    made = model.decode(images, batch["noise"])
    absolute = mx.abs(made - images).mean()
    perceptual = model.distance(images, made).mean()
    adversarial = batch["adversarial"].mean()
    fooled = -model.judged(made).mean()
    real, false = model.discriminator(images), model.discriminator(mx.stop_gradient(made))
    game = 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + false).mean())
    loss = absolute + PERCEPTUAL * perceptual + adversarial * (ADVERSARIAL * fooled + game)
    return loss, {"L1": absolute, "perceptual": perceptual, "discriminator": game}


class NoisyPictures(TrainingData):
    """Pictures, uint8 `[N, H, W, 3]`, half of them mirrored, with noise of random strengths for their latents."""

    def __init__(self, images: np.ndarray, latents: tuple[int, int, int], adversarial_from: int):
        self.images, self.latents, self.adversarial_from = images, latents, adversarial_from
        self.order = Order(len(images))

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        """The arrays of `decoder_loss`; noise has a standard deviation between 0 and `config.noise_std`."""
        images = self.images[self.order.take(config.batch_size, rng)]
        mirrored = rng.random(len(images)) < 0.5
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        level = config.noise_std * rng.random((len(images), 1, 1, 1), dtype=np.float32)
        on = round(progress * config.steps) >= self.adversarial_from
        return {
            "images": scale_pixels(images),
            "noise": level * rng.standard_normal((len(images), *self.latents), dtype=np.float32),
            "adversarial": np.full(len(images), on, np.float32),
        }


def measure_decoder(
    model: DecoderTraining, images: np.ndarray, noise: float, *, seed: int = 0, batch_size: int = 8
) -> DecoderQuality:
    """How near uint8 pictures `[N, H, W, 3]` come back from latents with noise of this standard deviation."""
    errors, distances = [], []
    for start in range(0, len(images), batch_size):
        part = mx.array(scale_pixels(images[start : start + batch_size]))
        shape = model.vae.encode(part).mean.shape
        drawn = np.random.Generator(np.random.Philox([seed, start])).standard_normal(shape, np.float32)
        made = mx.clip(model.decode(part, mx.array(noise * drawn)), -1, 1)
        errors.append(np.array(mx.square(made - part).mean(axis=(1, 2, 3))))
        distances.append(np.array(model.distance(part, made)))
    squared = max(float(np.concatenate(errors).mean()), 1e-12)
    return DecoderQuality(noise, 10 * math.log10(4 / squared), float(np.concatenate(distances).mean()))


@checked
def train_decoder(
    data: str | Path,
    model: str | Path,
    out: str | Path,
    training: TrainingOptions | None = None,
    *,
    perceptual: Sequence[str | Path] = (),
    adversarial_from: int | None = None,
    validation: float = 0.1,
    resume: bool = True,
    report: Callable[[str], None] = lambda line: None,
    begin: Callable[[TrainingConfig], None] = lambda config: None,
    progress: Watch = None,
    callback: Callback | None = None,
) -> DecoderReport:
    """Train the decoder of a text-to-image model, and write the model with it.

    Everything else of the model, its encoder's weights and so its latents too, stays as it is, bit for bit.

    Args:
        data: pictures; captions are not read.
        model: "demo", a model directory or a Hub repository of one.
        out: the model directory to write; checkpoints and the log are in `out/training/decoder`.
        training: how to train. `noise_std` is the strongest noise on normalized latents, by default the flow's.
        perceptual: files of torchvision's VGG16 and of LPIPS' weights for it, which pictures are compared by; by
            default the autoencoder's own encoder does that.
        adversarial_from: the step from which the discriminator takes part; by default half of the steps are without it.
        validation: share of the pictures that is held out, at most 100 of them; 0: measured on those trained on.
        resume: go on from the newest checkpoint.
        report: is told, in a line, what goes on.
        begin: is called with the settings before the first step.
        progress, callback: see `Trainer`.

    Raises:
        StarflowError: the model has no such decoder, there are too few pictures, files are missing or damaged, `out`
            holds another model; or as `Trainer` does.
    """
    source, out = ModelDirectory.find(model), Path(out)
    work = out / "training/decoder"
    _check_output(source, out, [data, *perceptual])
    flow = source.flow.config
    network = source.vae.load("float32")
    if not isinstance(network, AutoencoderKL) or not isinstance(flow, FlowConfig):
        raise StarflowError(f"{model} has no autoencoder of images: a decoder of videos is not trained here")
    if source.vae.quantization is not None:
        raise StarflowError(f"the autoencoder of {model} is quantized: train the decoder of the model it was made of")
    options = training or TrainingOptions()
    defaults = TrainingConfig(
        steps=STEPS, batch_size=BATCH_SIZE, lr=LEARNING_RATE, betas=(0.5, 0.9), noise_std=flow.noise_std
    )
    config = options.over(defaults)
    start = config.steps // 2 if adversarial_from is None else adversarial_from
    side = flow.img_size * network.config.downscale
    images, checksum = _read(data, side)
    chosen, held_out = split_samples(len(images), validation, MOST_HELD_OUT, config.seed)
    mx.random.seed(config.seed)
    whole = DecoderTraining(network, _read_vgg(perceptual) if perceptual else None)
    levels = (0.0, config.noise_std) if config.noise_std else (0.0,)
    watched = images[held_out] if len(held_out) else images[chosen][:MOST_HELD_OUT]
    before = tuple(measure_decoder(whole, watched, level) for level in levels)
    identity = {
        "autoencoder": network.config.to_dict(),
        "weights": digest(*(np.array(each.astype(mx.float32)) for _, each in sorted(source.vae.weights().items()))),
        "pictures": checksum,
        "perceptual": [Path(path).name for path in perceptual],
        "adversarial_from": start,
        "validation": validation,
    }
    if distributed.world().rank() == 0:
        if resume:
            check_resume(work, identity, config.seed)
        begin(config)
    trainer = Trainer(
        whole,
        NoisyPictures(images[chosen], (flow.img_size, flow.img_size, network.config.latent_channels), start),
        config,
        work,
        loss=decoder_loss,
        identity=identity,
        name="decoder",
        resume=resume,
        progress=watch(progress, callback),
    )
    assign(whole, trainer.run())
    after = tuple(measure_decoder(whole, watched, level) for level in levels)
    where = "held-out pictures" if len(held_out) else "the pictures trained on"
    for name, found in (("before", before), ("after", after)):
        report(f"{name}, {len(watched)} {where}: " + "; ".join(map(str, found)))
    if distributed.world().rank() == 0:
        _write(source, whole.vae, out)
        report(f"wrote {out}")
    return DecoderReport(before, after)


def _check_output(source: ModelDirectory, out: Path, inputs: Sequence[str | Path]) -> None:
    """Raise StarflowError unless the model may be written to `out`: nothing is there, or what an earlier run wrote."""
    if exists(out) and out.resolve() == source.path.resolve():
        raise StarflowError(f"{out} is the model's own folder; give another one to write to")
    check_outputs(folders=[out, out / "training"], inputs=[source.path, *inputs])
    if exists(out / "config.json") and not checkpoint_files(out / "training/decoder"):
        raise StarflowError(f"{out} holds another model; give another folder")


def _read(data: str | Path, side: int) -> tuple[np.ndarray, str]:
    """Pictures of a folder at one size, uint8 `[N, side, side, 3]`, and their checksum."""
    files = find_images([data])
    check_held(len(files), 3 * side * side)
    images = np.stack([np.asarray(crop_image(each.open(), side, side)) for each in files])
    return images, digest(images)


def _read_vgg(paths: Sequence[str | Path]) -> VGG16:
    """VGG16 from torchvision's file, with LPIPS' own if it is given too. Raises StarflowError."""
    tensors: dict[str, mx.array] = {}
    for path in map(Path, paths):
        tensors |= {name: each.read() for name, each in open_tensors(path).items()}
    network = VGG16()
    names = ", ".join(str(path) for path in paths)
    return load_module(network, network.sanitize(tensors), names, mx.float32)


def _write(source: ModelDirectory, vae: AutoencoderKL, out: Path) -> None:
    """The model again, with another decoder: tensors that were not trained are those of its files."""
    stored = source.vae.weights()
    trained = {name: weight for name, weight in flattened(vae.parameters()) if name.startswith(TRAINED)}
    tensors = {name: trained[name].astype(was.dtype) if name in trained else was for name, was in stored.items()}
    with transaction(out):
        if source.has("text_encoder"):
            copy_network(source.text_encoder, out / "text_encoder", "spiece.model")
        save_model(out / "vae", tensors, source.vae.content)
        save_model(out, source.flow.weights(), source.flow.content, files=read_notes(source))
