"""`mlx-starflow train`: a folder of captioned pictures to a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Model directory to write.")
@click.option("--preset", default="small", show_default=True, help="Sizes of the networks: small or demo.")
@click.option("--steps", type=int, help="Steps of the flow's training; the preset's by default.")
@click.option("--autoencoder-steps", type=int, help="Steps of the autoencoder's training; the preset's by default.")
@click.option("--batch-size", type=int, help="Pictures a step of the flow's training; the preset's by default.")
@click.option("--lr", type=float, help="Highest learning rate of the flow's training; the preset's by default.")
@click.option("--caption-dropout", type=float, help="Share of pictures trained without caption, for guidance.")
@click.option("--text-length", type=click.IntRange(min=2), help="Tokens of a caption that the model reads.")
@click.option("--save-seconds", type=float, help="Time between checkpoints.")
@click.option("--log-every", type=int, help="Steps between lines of the log.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run stopped.")
def train(
    data: Path,
    output: Path,
    preset: str,
    steps: int | None,
    autoencoder_steps: int | None,
    batch_size: int | None,
    lr: float | None,
    caption_dropout: float | None,
    text_length: int | None,
    save_seconds: float | None,
    log_every: int | None,
    seed: int,
    resume: bool,
) -> None:
    """Train a text-to-picture model on DATA, a folder of pictures with a metadata.jsonl.

    Each line of metadata.jsonl is an object with "file_name", "text" (the caption) and, if you like, "captions" (a
    list of other captions) and "split" (only "train", the default, reaches the flow). Ctrl-C saves; the same command
    resumes. Checkpoints and logs are in OUTPUT/training.
    """
    from mlx_starflow.training.recipe import get_preset, train_model

    chosen = get_preset(preset)
    both: dict[str, Any] = {"seed": seed, "save_seconds": save_seconds, "log_every": log_every}
    flow = {**both, "steps": steps, "batch_size": batch_size, "lr": lr, "caption_dropout": caption_dropout}
    autoencoder = {**both, "steps": autoencoder_steps}
    chosen = replace(
        chosen,
        flow={**chosen.flow, **_given({"txt_size": text_length})},
        flow_training=replace(chosen.flow_training, **_given(flow)),
        autoencoder_training=replace(chosen.autoencoder_training, **_given(autoencoder)),
    )
    try:
        train_model(data, output, chosen, resume=resume, report=click.echo)
    except KeyboardInterrupt:
        # Said and saved already; 130 is what a shell expects of an interrupted command.
        raise SystemExit(130) from None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
