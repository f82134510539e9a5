"""A tiny flow over text with random weights, and a directory of it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.text_flow import TextFlow, TextFlowConfig
from mlx_starflow.models.text_flow.block import codebook_mixture

CONFIG = {
    "alphabet": "abcdefg ", "length": 12, "channels": 32, "head_dim": 16, "layers_per_block": [2, 1],
    "components": [8, 0], "size": 3,
}  # fmt: skip


def text_flow(std: float = 0.25, **changes: object) -> TextFlow:
    """A flow with random weights; `std` is about that of its codebook, `changes` are its config's."""
    flow = TextFlow(TextFlowConfig.from_dict({**CONFIG, **changes}))
    rng = np.random.default_rng(0)
    weights = []
    for name, value in tree_flatten(flow.parameters()):
        noise = rng.standard_normal(value.shape)
        if name == "codebook.mean":
            noise = 1.5 * noise
        elif name == "codebook.log_std":
            noise = np.full(value.shape, np.log(std)) + 0.1 * noise
        elif name.endswith("mixture"):
            noise = 0.3 * noise
        else:
            noise = noise * (value.shape[-1] ** -0.5 if value.ndim == 2 else 0.2)
        if "proj_out" in name:
            noise = 0.3 * noise
        weights.append((name, mx.array(noise.astype(np.float32))))
    flow.update(tree_unflatten(weights))
    for block in flow.blocks:
        if "mixture" in block:
            # Not far from the codebook's numbers, as after training.
            block.mixture = block.mixture + codebook_mixture(block.config.mixture, flow.codebook)
    return flow


def text_model(folder: Path, **changes: object) -> Path:
    """A model directory of `text_flow`."""
    flow = text_flow(**changes)
    return save_model(folder, parameters(flow), {"model_type": "text_flow", **flow.config.to_dict()})
