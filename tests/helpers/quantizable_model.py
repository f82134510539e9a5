"""A complete model directory with shallow blocks and a deep one, trained for seconds, and pictures for it."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from PIL import Image

from helpers.tiny_model import tiny_flow, write_tiny_model
from mlx_starflow import load
from mlx_starflow.likelihood.requantize import read_pictures
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters


def write_pictures(folder: Path, count: int = 24) -> Path:
    """Colour gradients of 8x8 pixels with a metadata.jsonl; the last one belongs to another split."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 8)
    lines = []
    for index in range(count):
        down, right, base = rng.uniform(-80, 80, (3, 3)) + np.array([[0], [0], [128]])
        pixels = base + ramp[:, None, None] * down + ramp[None, :, None] * right
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index % 4}"}))
    lines[-1] = json.dumps({"file_name": f"{count - 1}.png", "text": "another", "split": "held_out"})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_quantizable_model(directory: Path, pictures: Path, steps: int = 30) -> Path:
    """As `write_tiny_model`, with a wider flow that has learned the latents of the pictures."""
    write_tiny_model(directory)
    vae = json.loads((directory / "vae/config.json").read_text())
    (directory / "vae/config.json").write_text(json.dumps({**vae, "scaling_factor": 4.0}))
    (directory / "NOTICE").write_text("whose it is")
    flow = tiny_flow(layers_per_block=[1, 1, 3], noise_std=0.1, use_final_norm=True)
    data = read_pictures(directory, pictures)
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
        noise = rng.standard_normal((6, *data.latents.shape[1:]))
        noisy = data.latents[chosen] + flow.config.noise_std * noise
        _, gradients = step(mx.array(noisy.astype(np.float32)), texts[mx.array(chosen)])
        optimizer.update(flow, gradients)
        mx.eval(flow.trainable_parameters(), optimizer.state)
    config = {"model_type": "starflow", **flow.config.to_dict(), "pipeline": {"guidance": 1.0, "temperature": 0.8}}
    save_model(directory, parameters(flow), config)
    return directory
