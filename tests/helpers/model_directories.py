"""Model directories of tiny flows: writing them, spoiling them, comparing them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from helpers.paths import DATA
from helpers.tiny_flows import tiny_flow
from mlx_starflow import load
from mlx_starflow.likelihood.quantization_cost import CaptionedData
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder

SPIECE = DATA / "t5/spiece.model"


def write_image_model(directory: Path) -> Path:
    """A complete text-to-image model; its images are 8x8 and have 16 tokens."""
    mx.random.seed(4)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    save_flow(directory, tiny_flow("image"), pipeline={"guidance": 1.0, "temperature": 0.8})
    return _add_encoders(directory, vae)


def write_video_model(directory: Path, **changes: object) -> Path:
    """A complete model of videos of 17 frames of 32x32; `changes` are the flow config's."""
    flow = tiny_flow("video", **changes)
    channels = flow.config.channel_size
    mx.random.seed(1)
    config = AutoencoderWanConfig(
        latents_mean=(0.1,) * channels, latents_std=(1.5,) * channels, base_dim=4, decoder_base_dim=4, z_dim=channels,
        num_res_blocks=1,
    )  # fmt: skip
    save_flow(directory, flow)
    return _add_encoders(directory, AutoencoderWan(config))


def write_class_model(directory: Path, **changes: object) -> Path:
    """A TarFlow over 8x8 images in 16 tokens, with 3 classes; `changes` are its config's."""
    flow = tiny_flow("classes", **changes)
    return save_model(directory, parameters(flow), {"model_type": "tarflow", **flow.config.to_dict()})


def write_level_model(directory: Path, **changes: object) -> Path:
    """An iTARFlow over the same images as `write_class_model`'s; `changes` are its config's."""
    flow = tiny_flow("levels", **changes)
    return save_model(directory, parameters(flow), {"model_type": "itarflow", **flow.config.to_dict()})


def write_trained_model(directory: Path, images: Path, steps: int = 30) -> Path:
    """As `write_image_model`, with three blocks that have learned the latents of a folder of images."""
    write_image_model(directory)
    vae = json.loads((directory / "vae/config.json").read_text())
    (directory / "vae/config.json").write_text(json.dumps({**vae, "scaling_factor": 4.0}))
    (directory / "NOTICE").write_text("whose it is")
    flow = tiny_flow(layers_per_block=[1, 1, 3], noise_std=0.1, use_final_norm=True)
    data = CaptionedData.read(load(directory), images)
    texts = load(directory).encode_prompts(data.captions)
    # Only the last projections learn, which takes a fraction of the time and is enough to have something to lose.
    flow.freeze()
    for block in flow.blocks:
        block.proj_out.weight = mx.zeros_like(block.proj_out.weight)
        block.proj_out.unfreeze()
    optimizer = optim.Adam(5e-3)
    step = nn.value_and_grad(flow, lambda x, text: flow(x, text).loss())
    rng = np.random.default_rng(1)
    for _ in range(steps):
        chosen = rng.choice(len(texts), 6)
        noise = rng.standard_normal((6, *data.data.shape[1:]))
        noisy = data.data[chosen] + flow.config.noise_std * noise
        _, gradients = step(mx.array(noisy.astype(np.float32)), texts[mx.array(chosen)])
        optimizer.update(flow, gradients)
        mx.eval(flow.trainable_parameters(), optimizer.state)
    return save_flow(directory, flow, pipeline={"guidance": 1.0, "temperature": 0.8})


def _add_encoders(directory: Path, vae: AutoencoderKL | AutoencoderWan) -> Path:
    encoder = T5Encoder(T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    save_model(directory / "text_encoder", parameters(encoder), encoder.config.to_dict())
    shutil.copy(SPIECE, directory / "text_encoder/spiece.model")
    save_model(directory / "vae", parameters(vae), vae.config.to_dict())
    return directory


def config_of(flow: STARFlow, **more: object) -> dict[str, object]:
    """What a directory's config.json says about a flow."""
    return {"model_type": "starflow", **flow.config.to_dict(), **more}


def save_flow(
    directory: Path,
    flow: STARFlow | None = None,
    max_shard_gb: float = 5,
    files: dict[str, bytes] | None = None,
    **more: object,
) -> Path:
    """A directory of a flow alone (a tiny one if none is given); `more` goes into its config.json."""
    flow = flow or tiny_flow()
    return save_model(directory, parameters(flow), config_of(flow, **more), max_shard_gb=max_shard_gb, files=files)


def size(directory: Path) -> int:
    """Bytes of a network's weights."""
    return sum(value.nbytes for value in load_weights(directory).values())


def same(first: dict[str, mx.array], second: dict[str, mx.array]) -> bool:
    """Whether two dictionaries hold the same arrays under the same names."""
    return first.keys() == second.keys() and all(mx.array_equal(first[name], second[name]).item() for name in first)


def edit_config(directory: Path, **changes: object) -> None:
    """Change keys of config.json, or remove those that are None."""
    config = read_config(directory) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(directory: Path, **changes: mx.array | None) -> None:
    """Change weights, with `__` for each dot of a name, or remove those that are None."""
    weights = {name: mx.array(w) for name, w in load_weights(directory).items()}
    weights |= {name.replace("__", "."): value for name, value in changes.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), {n: w for n, w in weights.items() if w is not None})
