"""LoRA on your own style: fine-tune on a folder of captioned pictures, and draw the same prompts before and after.

    python examples/style_data.py data/twemoji
    python examples/lora_style.py data/twemoji --out runs/twemoji

The grid's first row is by the base, the next ones by the adapter at half and at full strength, all with one seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_starflow import load
from mlx_starflow.media import grid, save_image
from mlx_starflow.training.finetune import FinetuneConfig, finetune

PROMPTS = "red apple, slice of pizza, cat face, dog face, rocket, octopus, tulip, guitar, hamburger, sun".split(", ")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="captioned pictures, or a cache of them")
    parser.add_argument("--out", type=Path, default=Path("runs/style"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args(arguments)
    config = FinetuneConfig(rank=args.rank, steps=args.steps, batch_size=args.batch_size, samples=0)
    result = finetune(args.model, args.data, args.out, config, report=print)
    print(result)
    rows = []
    for strength in (0.0, 0.5, 1.0):
        pipe = load(args.model, adapters=[(result.folder, strength)])
        rows += pipe.generate(PROMPTS, seed=1, verify=False).images
    save_image(grid(rows, columns=len(PROMPTS)), args.out / "strengths.png")
    print(f"{args.out / 'strengths.png'}: {', '.join(PROMPTS)}")


if __name__ == "__main__":
    main()
