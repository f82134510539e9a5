"""Train a small flow on toy data and sample from it: all of the training loop in one page.

    python examples/train_flow.py                 # a minute or two on a laptop

The "pictures" are 8x8 latents with one channel: a bright Gaussian spot on a dark ground, at a random place. The flow
learns their distribution by exact maximum likelihood. Samples carry the noise of the training, which one score step
removes, and are printed as characters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.sampling import denoise, sample
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import Order
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign

SIDE = 8
NOISE = 0.1


class Spots:
    """Batches of spots; whatever is random comes from the trainer's generator, so that runs can be repeated."""

    def __init__(self, count: int = 512, seed: int = 0):
        rows, columns = np.random.default_rng(seed).uniform(1, SIDE - 2, (2, count, 1, 1))
        squared = (np.arange(SIDE)[:, None] - rows) ** 2 + (np.arange(SIDE) - columns) ** 2
        self.latents = (2 * np.exp(-squared / 2) - 0.5).astype(np.float32)[..., None]
        self.order = Order(count)

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        latents = self.latents[self.order.take(config.batch_size, rng)]
        return {"latents": latents, "noise": rng.standard_normal(latents.shape, dtype=np.float32)}


def train(out: Path, steps: int, channels: int) -> STARFlow:
    mx.random.seed(0)
    config = FlowConfig(
        img_size=SIDE,
        channel_size=1,
        patch_size=2,
        channels=channels,
        layers_per_block=[1, 1, 2],
        head_dim=32,
        noise_std=NOISE,
        use_softplus=True,
        use_final_norm=True,
    )
    flow = STARFlow(config)
    training = TrainingConfig(steps=steps, batch_size=64, lr=2e-3, ema=0.99)
    trainer = Trainer(
        flow,
        Spots(),
        training,
        out,
        name="spots",
    )
    assign(flow, trainer.run())
    return flow


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/spots"), help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--channels", type=int, default=64)
    args = parser.parse_args(arguments)
    flow = train(args.out, args.steps, args.channels)
    z = mx.array(np.random.default_rng(7).standard_normal((4, SIDE, SIDE, 1), dtype=np.float32))
    spots = np.array(denoise(flow, sample(flow, z)))[..., 0]
    for row in range(SIDE):
        print("   ".join("".join(" .:*#"[int(np.clip(v + 0.5, 0, 2) * 2)] for v in spot[row]) for spot in spots))


if __name__ == "__main__":
    main()
