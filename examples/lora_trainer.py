"""LoRA on your own style, in Python: `Trainer(flow, data, TrainingConfig(...)).run()` and nothing else.

    mlx-starflow cache my-pictures -o cache
    python examples/lora_trainer.py cache runs/lora
    mlx-starflow generate "a red apple" --lora runs/lora/adapter 1

`mlx-starflow finetune` does this too, and more of it: it chooses by memory, holds pictures out, anchors to the base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_starflow import load_flow
from mlx_starflow.model_dir.weights import training_dtype
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.cache.reading import CachedLatents, LatentCache
from mlx_starflow.training.finetuning.adapters import AdapterConfig, attach, save_adapter
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="made by mlx-starflow cache for the same model")
    parser.add_argument("out", type=Path, help="folder of the adapter and of the checkpoints")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(arguments)

    data = CachedLatents(LatentCache(args.cache, args.model))
    flow = load_flow(args.model, dtype=training_dtype())  # gradients leave the range of float16, a GPU's default
    adapter = AdapterConfig(rank=args.rank)
    attach(flow, adapter)  # freezes the flow: the trainer trains what is not frozen
    config = TrainingConfig(steps=args.steps, batch_size=args.batch_size, lr=2e-3, ema=0.99, context_partial=0.3)
    weights = Trainer(flow, data, config, args.out).run()
    assign(flow, weights)  # the averaged ones
    print(f"wrote {save_adapter(args.out / 'adapter', flow, adapter, {'model': args.model})}")


if __name__ == "__main__":
    main()
