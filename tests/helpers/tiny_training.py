"""A tiny flow with a text encoder, and data for it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import Order
from mlx_starflow.training.data.dropout import context_mask, context_share
from mlx_starflow.training.recipes.text import TextFlow, initialize_text_encoder

FLOW = {
    "img_size": 4, "channel_size": 2, "patch_size": 1, "channels": 32, "layers_per_block": [1, 1], "head_dim": 32,
    "txt_size": 3, "txt_dim": 8, "use_softplus": True, "use_final_norm": True, "soft_clip": 4.0,
}  # fmt: skip
TEXT = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


class TinyData:
    """Latents that depend on their one-word text."""

    def __init__(self, count: int = 12):
        rng = np.random.default_rng(5)
        self.latents = rng.standard_normal((count, 4, 4, 2), dtype=np.float32)
        self.order = Order(count)

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        return self.arrays(self.order.take(config.batch_size, rng), rng, config, progress)

    def arrays(
        self, chosen: np.ndarray, rng: np.random.Generator, config: TrainingConfig, progress: float
    ) -> dict[str, np.ndarray]:
        ids = np.stack([chosen + 3, np.ones_like(chosen), np.zeros_like(chosen)], axis=1)
        share = context_share(config.context_full, progress)
        return {
            "latents": self.latents[chosen],
            "noise": rng.standard_normal((len(chosen), 4, 4, 2), dtype=np.float32),
            "context_mask": context_mask(rng, len(chosen), 16, share, config.context_partial),
            "ids": ids.astype(np.int32),
            "mask": (ids != 0).astype(np.int32),
        }


def make_model(**changes: object) -> TextFlow:
    mx.random.seed(3)
    model = TextFlow(
        STARFlow(FlowConfig(**{**FLOW, **changes})), T5Encoder(T5Config(**TEXT, feed_forward_proj="gated-gelu"))
    )
    initialize_text_encoder(model.text_encoder)
    return model
