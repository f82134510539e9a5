"""What an anchor does against forgetting: fine-tuning with and without it, measured on new and on old pictures.

    python examples/scene_data.py data/scenes --pictures data/pictures
    python examples/style_data.py data/twemoji --style twemoji
    python examples/reports/forgetting.py data/pictures data/twemoji

Half of the old pictures may be given to the anchor; the likelihood on old data is that of others. All likelihoods are
exact, in nats per latent dimension, with standard errors of the paired change. Folders may be caches too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mlx_starflow import load_flow
from mlx_starflow.training.data.cache.reading import LatentCache
from mlx_starflow.training.finetuning.adapters import AdapterConfig, attach
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.data import AnchorImages, AnchorSamples, FinetuneData, cached_nll, finetune_loss
from mlx_starflow.training.finetuning.finetune import open_cache
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign


def halves(cache: LatentCache, measured: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of pictures to train on, and of `measured` others."""
    order = np.random.default_rng(3).permutation(len(cache))
    return np.sort(order[: len(cache) // 2]), np.sort(order[-measured:])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="pictures that the model was trained on")
    parser.add_argument("new", help="pictures to fine-tune it on")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8, help="new pictures a step; anchored ones come on top")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--measured", type=int, default=64, help="pictures of each kind")
    args = parser.parse_args(arguments)
    old = open_cache(args.old, args.out / "old-cache", args.model, print)
    new = open_cache(args.new, args.out / "new-cache", args.model, print)
    old_half, old_measured = halves(old, args.measured)
    new_half, new_measured = halves(new, args.measured)
    base = load_flow(args.model)
    before = [cached_nll(base, *part, draws=1, seed=0) for part in ((new, new_measured), (old, old_measured))]
    print(f"before: new {before[0]}, old {before[1]}", flush=True)
    anchors = {
        "no anchor": None,
        "old pictures": AnchorImages(old, old_half),
        "own samples": AnchorSamples.draw(base, new, new_half, 64, 0),
    }
    for name, anchor in anchors.items():
        flow = load_flow(args.model)
        attach(flow, AdapterConfig(rank=args.rank))
        # The same number of new pictures with an anchor and without.
        count = args.batch_size // 2 if anchor else 0
        size = args.batch_size + count
        data = FinetuneData(new, new_half, flow.config.noise_std, anchor, count / size)
        config = FinetuneConfig(steps=args.steps).training(size)
        folder = args.out / name.replace(" ", "-")
        assign(flow, Trainer(flow, data, config, folder, loss=finetune_loss, name=name, resume=False).run())
        parts = ((new, new_measured), (old, old_measured))
        after = [cached_nll(flow, *part, draws=1, seed=0) for part in parts]
        gain, loss = (a - b for a, b in zip(after, before, strict=True))
        print(f"{name:<13} new {gain.mean:+.4f} +- {gain.standard_error:.4f}", end="   ")
        print(f"old {loss.mean:+.4f} +- {loss.standard_error:.4f}", flush=True)


if __name__ == "__main__":
    main()
