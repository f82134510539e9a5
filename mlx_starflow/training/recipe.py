"""From a folder of captioned pictures to a text-to-picture model: autoencoder, tokenizer, flow and text encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.saving import save_model
from mlx_starflow.training.autoencoder import encode_views, train_autoencoder
from mlx_starflow.training.data import PictureFolder
from mlx_starflow.training.optim import assign
from mlx_starflow.training.text import CaptionedLatents, TextFlow, initialize_text_encoder, train_tokenizer
from mlx_starflow.training.trainer import Trainer, TrainingConfig
from mlx_starflow.weights import parameters


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
        autoencoder_training=TrainingConfig(steps=2000, batch_size=16, lr=1.5e-3),
        flow_training=TrainingConfig(steps=5000, lr=1.2e-3),
        pipeline=_SAMPLING,
    ),
    # The sizes of the embedded model.
    "demo": Preset(
        size=64,
        autoencoder={"block_out_channels": [32, 64, 96], "layers_per_block": 1, "norm_num_groups": 8},
        text_encoder={"d_model": 192, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 3},
        flow={**_FLOW, "channels": 256, "layers_per_block": [2, 2, 6], "top_block_channels": 320},
        autoencoder_training=TrainingConfig(steps=3200, batch_size=16, lr=1.5e-3),
        flow_training=TrainingConfig(steps=17000, lr=1.2e-3),
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
        data: a folder of pictures with a `metadata.jsonl` of `file_name`, `text` and perhaps `captions` (other texts)
            and `split`: "train" (the default), "autoencoder" (the flow does not see it) or anything else (not used).
        out: the model directory; checkpoints and logs are in `out/training`.
        preset: sizes and lengths; see `PRESETS`.
        resume: go on where an earlier run into `out` stopped; else start again.
        report: is told, in a line, what goes on.

    Raises:
        StarflowError: the data cannot be used, a training diverges, or `out` holds the training of another model.
    """
    out = Path(out)
    work = out / "training"
    autoencoder_config = preset.autoencoder_config()
    # Twice the size, so that views are made smaller and not larger.
    pictures = PictureFolder.read(data, size=2 * preset.size, splits=("train", "autoencoder"))
    captioned = pictures.only("train")
    captions = [text for texts in captioned.captions for text in texts]
    spiece = work / "spiece.model"
    if not resume:
        spiece.unlink(missing_ok=True)
    tokenizer = train_tokenizer(captions, spiece, preset.vocab_size)
    report(
        f"{len(captioned)} pictures for the flow, {len(pictures)} for the autoencoder; {tokenizer.vocab_size} tokens"
    )

    length = preset.flow["txt_size"]
    if cut := sum(tokenizer.batch(captions, length)[2]):
        report(f"{cut} of {len(captions)} captions are cut: they are longer than {length} tokens (--text-length)")
    autoencoder = train_autoencoder(
        pictures, autoencoder_config, preset.autoencoder_training, work / "autoencoder", resume=resume
    )
    rng = np.random.default_rng(preset.flow_training.seed)
    latents = encode_views(autoencoder, captioned.pictures, preset.views, rng)
    mean, std = latents.mean(axis=(0, 1, 2, 3), dtype=np.float64), latents.std(axis=(0, 1, 2, 3), dtype=np.float64)
    std = np.maximum(std, 1e-6)  # a channel may be dead
    latents = ((latents - mean) / std).astype(np.float32)
    report("autoencoder done; latents have std " + ", ".join(f"{value:.2f}" for value in std))

    mx.random.seed(preset.flow_training.seed)
    flow_config, text_config = preset.flow_config(), preset.text_config(tokenizer.vocab_size)
    model = TextFlow(STARFlow(flow_config), T5Encoder(text_config))
    initialize_text_encoder(model.text_encoder)
    tokens = (flow_config.img_size // flow_config.patch_size) ** 2
    samples = CaptionedLatents(latents, captioned.captions, tokenizer, text_length=flow_config.txt_size, tokens=tokens)
    trainer = Trainer(model, TextFlow.loss, samples, preset.flow_training, work / "flow", name="flow", resume=resume)
    assign(model, trainer.run())

    autoencoder_config = replace(autoencoder_config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    write_model(out, model, autoencoder, autoencoder_config, spiece, preset.pipeline)
    report(f"wrote {out}")
    return out


def write_model(
    out: Path,
    model: TextFlow,
    autoencoder: AutoencoderKL,
    autoencoder_config: AutoencoderKLConfig,
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
    save_model(out / "vae", parameters(autoencoder), autoencoder_config.to_dict())
    # The flow last: without its config.json the directory is not yet a model.
    save_model(out, parameters(model.flow), flow_config)
