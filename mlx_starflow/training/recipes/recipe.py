"""From a folder of captioned pictures to a text-to-picture model: autoencoder, tokenizer, flow and text encoder."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.images import to_images
from mlx_starflow.media.sources import write_skips
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.sampling import denoise, sample
from mlx_starflow.training.data.image_folder import PictureFolder
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.config import TrainingConfig
from mlx_starflow.training.loop.schedules import assign
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.recipes.autoencoder import encode_views, train_autoencoder
from mlx_starflow.training.recipes.text import CaptionedLatents, TextFlow, initialize_text_encoder, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of the networks and lengths of their trainings.

    `size` is the side of the pictures in pixels; `views` the random views of each picture that the flow sees; `flow`
    lacks what follows from the others (`img_size`, `channel_size`, `txt_dim`).
    """

    size: int
    autoencoder: dict[str, Any]
    text_encoder: dict[str, Any]
    flow: dict[str, Any]
    vocab_size: int = 1500
    views: int = 12
    autoencoder_training: TrainingConfig
    flow_training: TrainingConfig
    pipeline: dict[str, Any] = field(default_factory=dict)

    def autoencoder_config(self) -> AutoencoderKLConfig:
        settings = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.0}
        return AutoencoderKLConfig.from_dict({**settings, **self.autoencoder, "sample_size": self.size})

    def text_config(self, vocab_size: int) -> T5Config:
        return T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", **self.text_encoder)

    def flow_config(self) -> FlowConfig:
        autoencoder = self.autoencoder_config()
        return FlowConfig(
            img_size=self.size // autoencoder.downscale,
            channel_size=autoencoder.latent_channels,
            txt_dim=self.text_encoder["d_model"],
            noise_std=self.flow_training.noise_std,
            **self.flow,
        )


_FLOW = {
    "patch_size": 4,
    "head_dim": 64,
    "txt_size": 12,
    "use_softplus": True,
    "use_final_norm": True,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "soft_clip": 4.0,
}

_ADAMW = {"betas": (0.9, 0.98), "weight_decay": 0.01}

_SAMPLING = {"guidance": 1.0, "temperature": 0.7}

PRESETS = {
    # For trying things out: minutes, not hours.
    "small": Preset(
        size=32,
        autoencoder={
            "block_out_channels": [32, 64],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
        },
        text_encoder={"d_model": 128, "d_kv": 64, "d_ff": 256, "num_layers": 1, "num_heads": 2},
        flow={**_FLOW, "channels": 128, "layers_per_block": [1, 1, 4], "top_block_channels": 192},
        views=8,
        autoencoder_training=TrainingConfig(steps=2000, batch_size=16, lr=1.5e-3, **_ADAMW),
        flow_training=TrainingConfig(steps=5000, lr=1.2e-3, **_ADAMW),
        pipeline=_SAMPLING,
    ),
    # The sizes of the embedded model.
    "demo": Preset(
        size=64,
        autoencoder={"block_out_channels": [32, 64, 96], "layers_per_block": 1, "norm_num_groups": 8},
        text_encoder={"d_model": 192, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 3},
        flow={**_FLOW, "channels": 256, "layers_per_block": [2, 2, 6], "top_block_channels": 320},
        autoencoder_training=TrainingConfig(steps=3200, batch_size=16, lr=1.5e-3, **_ADAMW),
        flow_training=TrainingConfig(steps=17000, lr=1.2e-3, **_ADAMW),
        pipeline=_SAMPLING,
    ),
}


def get_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise StarflowError(f"unknown preset {name!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def train_model(
    data: str | Path,
    out: str | Path,
    preset: Preset,
    *,
    resume: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a text-to-picture model and write it as a model directory that `mlx_starflow.load` reads.

    Args:
        data: captioned pictures, see `open_source`. Metadata may give further `captions` and a `split`: "train" (the
            default), "autoencoder" (the flow does not see it), "validation" (nothing is trained on it) or anything
            else (not used). Pictures that cannot be used are listed in `out/training/skipped.txt`.
        out: the model directory; checkpoints and logs are in `out/training`.
        preset: sizes and lengths; see `PRESETS`.
        resume: go on where an earlier run into `out` stopped; else start again.
        report: is told, in a line, what goes on.

    With `mlx.launch` all processes do this together, and rank 0 alone writes and reports.

    Raises:
        StarflowError: the data cannot be used, a training diverges, or `out` holds the training of another model.
    """
    out = Path(out)
    work = out / "training"
    group = distributed.world()
    first = group.rank() == 0
    say = report if first else lambda line: None
    # Twice the size, so that views are made smaller and not larger.
    pictures = PictureFolder.read(data, size=2 * preset.size, splits=("train", "autoencoder", "validation"))
    captioned, held_out = pictures.only("train"), pictures.only("validation")
    if not held_out and (preset.flow_training.validate_every or preset.flow_training.patience):
        raise StarflowError(
            f'{data} has nothing to validate on: give some lines of its metadata "split": "validation", '
            "or leave --validate-every and --patience out"
        )
    if first:
        write_skips(work / "skipped.txt", pictures.skipped)
    pictures = pictures.only("train", "autoencoder")
    with distributed.peers("train", group):
        tokenizer, spiece = _tokenizer(captioned, work, preset.vocab_size, resume, group)
    say(f"{len(captioned)} pictures for the flow, {len(pictures)} for the autoencoder; {tokenizer.vocab_size} tokens")

    length = preset.flow["txt_size"]
    captions = [text for texts in captioned.captions for text in texts]
    if cut := sum(tokenizer.batch(captions, length)[2]):
        say(f"{cut} of {len(captions)} captions are cut: they are longer than {length} tokens (--text-length)")
    autoencoder = train_autoencoder(
        pictures, preset.autoencoder_config(), preset.autoencoder_training, work / "autoencoder", resume=resume
    )
    rng = np.random.default_rng(preset.flow_training.seed)
    latents = encode_views(autoencoder, captioned.pictures, preset.views, rng)
    mean, std = latents.mean(axis=(0, 1, 2, 3), dtype=np.float64), latents.std(axis=(0, 1, 2, 3), dtype=np.float64)
    std = np.maximum(std, 1e-6)  # a channel may be dead
    autoencoder.config = replace(autoencoder.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    say("autoencoder done; latents have std " + ", ".join(f"{value:.2f}" for value in std))

    mx.random.seed(preset.flow_training.seed)
    flow_config = preset.flow_config()
    model = TextFlow(STARFlow(flow_config), T5Encoder(preset.text_config(tokenizer.vocab_size)))
    initialize_text_encoder(model.text_encoder)

    def samples(latents: np.ndarray, captions: list[list[str]]) -> CaptionedLatents:
        tokens = (flow_config.img_size // flow_config.patch_size) ** 2
        normalized = ((latents - mean) / std).astype(np.float32)
        return CaptionedLatents(normalized, captions, tokenizer, text_length=length, tokens=tokens)

    validation = None
    if held_out:
        views = encode_views(autoencoder, held_out.pictures, 1, np.random.default_rng(preset.flow_training.seed))
        validation = samples(views, held_out.captions)
    watched = held_out if held_out else captioned
    trainer = Trainer(
        model,
        samples(latents, captioned.captions),
        preset.flow_training,
        work / "flow",
        loss=partial(TextFlow.loss, checkpoint=preset.flow_training.checkpoint_layers),
        nll=TextFlow.nll,
        validation=validation,
        samples=partial(
            draw_samples,
            autoencoder=autoencoder,
            tokenizer=tokenizer,
            captions=[texts[0] for texts in watched.captions[:8]],
        ),
        name="flow",
        resume=resume,
    )
    assign(model, trainer.run())
    if first:
        write_model(out, model, autoencoder, spiece, preset.pipeline)
    with distributed.peers("train", group):
        distributed.wait(group)
    say(f"wrote {out}")
    return out


def _tokenizer(
    captioned: PictureFolder, work: Path, vocab_size: int, resume: bool, group: mx.distributed.Group
) -> tuple[Tokenizer, Path]:
    """The tokenizer, the same in all processes, and where rank 0 keeps it."""
    spiece = work / "spiece.model"
    note = None
    if group.rank() == 0:
        if not resume:
            spiece.unlink(missing_ok=True)
        tokenizer = train_tokenizer([text for texts in captioned.captions for text in texts], spiece, vocab_size)
        note = base64.b64encode(spiece.read_bytes()).decode()
    _, note = distributed.from_first({}, note, group)
    if group.rank():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "spiece.model"
            path.write_bytes(base64.b64decode(note))
            tokenizer = Tokenizer(path)
    return tokenizer, spiece


def draw_samples(
    model: TextFlow, *, autoencoder: AutoencoderKL, tokenizer: Tokenizer, captions: Sequence[str]
) -> list[Image.Image]:
    """A picture of each caption, without guidance, always from the same noise."""
    flow = model.flow
    config = flow.config
    ids, mask, _ = tokenizer.batch(captions, config.txt_size)
    text = model.text_encoder.encode(mx.array(ids), mx.array(mask))
    shape = (len(captions), config.img_size, config.img_size, config.channel_size)
    z = mx.array(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    x = denoise(flow, sample(flow, z, text), text)
    return to_images(np.array(autoencoder.decode(autoencoder.unscale(x)).astype(mx.float32)))


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
    save_model(out / "text_encoder", parameters(encoder), encoder.config.to_dict(), files=tokenizer)
    save_model(out / "vae", parameters(autoencoder), autoencoder.config.to_dict())
    # The flow last: without its config.json the directory is not yet a model.
    save_model(out, parameters(model.flow), flow_config)
