"""LoRA on your own style: fine-tune on a folder of captioned pictures, and draw the same prompts before and after.

    pip install resvg-py
    python examples/style_data.py data/contrast
    python examples/lora_style.py data/contrast --out runs/contrast

The first row of base-and-tuned.png is by the base, the second by the adapter; strengths.png has a row at half strength
between them. All have one seed. The settings below made the picture in docs/finetuning.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_starflow import load
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.finetune import finetune

THINGS = "a red apple, a slice of pizza, a cat, a dog, a rocket, an octopus, a tulip, a guitar, a hamburger, a sun"
PROMPTS = [f"{thing} on a white background" for thing in THINGS.split(", ")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="captioned pictures, or a cache of them")
    parser.add_argument("--out", type=Path, default=Path("runs/style"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args(arguments)
    config = FinetuneConfig(
        rank=args.rank,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=3e-3,
        # So that the flow draws from the text, and does not only go on with what it has drawn.
        context_full=0.4,
        context_partial=0.3,
        samples=0,
    )
    result = finetune(args.model, args.data, args.out, config, report=print)
    print(result)
    rows = []
    for strength in (0.0, 0.5, 1.0):
        pipe = load(args.model, adapters=[(result.folder, strength)])
        rows += pipe.generate(PROMPTS, seed=1, verify=False).images
    count = len(PROMPTS)
    save_image(grid(rows, columns=count), args.out / "strengths.png")
    save_image(grid(rows[:count] + rows[-count:], columns=count), args.out / "base-and-tuned.png")
    print(f"{args.out / 'base-and-tuned.png'}: {', '.join(PROMPTS)}")


if __name__ == "__main__":
    main()
