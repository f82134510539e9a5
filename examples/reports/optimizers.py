"""What each optimizer costs in memory and gives in likelihood: one small flow, equal steps, one table.

    python examples/reports/optimizers.py

The flow learns 8x8 latents with a bright spot at a random place (see examples/train_flow.py).
Memory is MLX's own count: at rest (weights and optimizer state) and the peak of training. The likelihood is that of
spots that no training has seen. No average of the weights is kept, which would take as much memory as they do.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mlx.core as mx

from mlx_starflow.likelihood import exact_nll
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.training.config import OPTIMIZERS, TrainingConfig
from mlx_starflow.training.loop.run_log import read_log
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import trainable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_flow import NOISE, SIDE, Spots

RATES = {"adamw": 1e-3, "adafactor": 1e-3, "muon": 5e-3, "sinkgd": 2e-2}
"""Learning rates: SinkGD's steps are 0.05 of its rate, and the entries of Muon's about 0.2 of its."""


def make_flow(channels: int) -> STARFlow:
    mx.random.seed(0)
    return STARFlow(
        FlowConfig(
            img_size=SIDE,
            channel_size=1,
            patch_size=2,
            channels=channels,
            layers_per_block=[1, 1, 4],
            head_dim=64,
            noise_std=NOISE,
            use_softplus=True,
            use_final_norm=True,
        )
    )


def measure(kind: str, steps: int, channels: int, batch_size: int) -> str:
    """Train with one optimizer; its line of the table."""
    flow = make_flow(channels)
    config = TrainingConfig(
        steps=steps, batch_size=batch_size, lr=RATES[kind], optimizer=kind, ema=0.0, log_every=max(1, steps // 4)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(flow, Spots(4096), config, folder, name=kind)
        mx.eval(flow.parameters(), trainer.optimizer.state)
        mx.clear_cache()
        mx.reset_peak_memory()
        with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
            trainer.run()
        # The last quarter: the first steps compile.
        rate = read_log(trainer.folder)[-1]["samples_per_second"]
    weights, state = (
        sum(array.nbytes for array in arrays.values()) / 1e6
        for arrays in (trainable(flow), trainer.optimizer.flat_state())
    )
    nll = exact_nll(flow, Spots(64, seed=1).latents, draws=1)
    return (
        f"{kind:<9}  {weights:>10.1f}  {state:>8.1f}  {trainer.peak_memory / 1e6:>7.1f}  "
        f"{1000 * batch_size / rate:>7.0f}  {nll.mean:.4f} +- {nll.standard_error:.4f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(arguments)
    print(f"{args.steps} steps of {args.batch_size} samples")
    print("optimizer  weights MB  state MB  peak MB  ms/step  held-out NLL, nats/dim")
    for kind in OPTIMIZERS:
        # A process each: what one leaves behind must not count as the next one's.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            print(pool.submit(measure, kind, args.steps, args.channels, args.batch_size).result(), flush=True)


if __name__ == "__main__":
    main()
