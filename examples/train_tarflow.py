"""Train a TarFlow on your own pictures: a flow over pixels, with a class label where your folders give one.

    python examples/train_tarflow.py pictures runs/tarflow --size 32

`pictures` holds a folder for each class (cats/1.png, dogs/1.png, ...), or a metadata.jsonl whose "text" is the class.
Every tenth picture is held out: training shows its exact likelihood, keeps the weights that do best on it and stops
when they stop getting better. runs/tarflow/training has a loss curve and samples of each class to watch; Ctrl-C saves,
and the same command resumes. At the end runs/tarflow is a model directory for `mlx_starflow.load_flow`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx

from mlx_starflow.media.images import grid, save_image
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.labelled_images import LabelledImages
from mlx_starflow.training.loop.samples import draw_classes
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="folder of pictures")
    parser.add_argument("out", type=Path, help="model directory to write")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels")
    parser.add_argument("--patch", type=int, default=4, help="side of a token in pixels")
    parser.add_argument("--channels", type=int, default=256, help="width of the network, a multiple of 64")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--noise", choices=["gaussian", "uniform"], default="gaussian", help="uniform: for likelihood")
    args = parser.parse_args(arguments)

    data, held_out = LabelledImages.read(args.pictures, size=args.size).split(10)
    classes = len(data.classes) if len(data.classes) > 1 else 0
    mx.random.seed(0)
    flow = TarFlow(
        TarFlowConfig(
            img_size=args.size,
            channel_size=3,
            patch_size=args.patch,
            channels=args.channels,
            blocks=args.blocks,
            layers_per_block=2,
            num_classes=classes,
            noise_type=args.noise,
        )
    )
    every = max(1, args.steps // 20)
    config = TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=5e-4,
        log_every=max(1, every // 5),
        watch_every=every,
        validate_every=every,
        patience=5,
    )
    trainer = Trainer(
        flow, data, config, args.out / "training", validation=held_out, samples=draw_classes, name="tarflow"
    )
    assign(flow, trainer.run())
    save_model(args.out, parameters(flow), {"model_type": "tarflow", **flow.config.to_dict()})
    save_image(grid(draw_classes(flow)), args.out / "samples.png")
    print(f"wrote {args.out}: classes {', '.join(data.classes)}; its samples are in {args.out / 'samples.png'}")


if __name__ == "__main__":
    main()
