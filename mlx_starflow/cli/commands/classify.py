"""`mlx-starflow classify`: which label an image has, by Bayes' rule."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.classes import set_noise_level
from mlx_starflow.cli.options.images import (
    ReadableFiles,
    check_split,
    frames_option,
    images_argument,
    model_options,
    noise_level_option,
    noise_options,
    table_options,
)
from mlx_starflow.cli.options.outputs import claim_outputs, files_read, overwrite_option
from mlx_starflow.cli.options.rules import excludes, option_rules
from mlx_starflow.cli.options.text import Lines


@click.command()
@images_argument
@click.option("-l", "--labels", help="Comma between them; all classes by default, if the model is a TarFlow.")
@click.option("--label-file", type=Lines(), help="Labels from a file, one a line; - is standard input.")
@click.option("--split", help='Of folders with a metadata.jsonl: only lines with this "split".')
@table_options
@overwrite_option
@noise_options
@noise_level_option
@model_options
@frames_option
@option_rules(
    excludes("--csv -", "--json -", reason="--csv - and --json - would be printed together: write one to a file")
)
def classify(
    pictures: tuple[Path, ...],
    labels: str | None,
    label_file: list[str] | None,
    split: str | None,
    csv_file: Path | None,
    json_file: Path | None,
    draws: int,
    seed: int,
    batch_size: int,
    noise_level: float | None,
    model: str,
    adapters: tuple[tuple[str, float], ...],
    size: tuple[int, int] | None,
    frames: int | None,
    dtype: str | None,
    low_memory: bool | None,
) -> None:
    """Say which of some labels each of PICTURES has, by Bayes' rule with the flow as p(picture | label).

    \b
    mlx-starflow classify cat.png --labels "a cat,a dog,a rocket"

    All labels see the same noise. The margin is what the best label is ahead of the second, in nats; probabilities
    follow from it and are nearly always close to 0 or 1.
    """
    from mlx_starflow.media.image_files import find_images
    from mlx_starflow.media.tables import write_csv, write_json
    from mlx_starflow.pipelines import ClassPipeline, open_model

    names = [label.strip() for label in (labels or "").split(",")] + (label_file or [])
    names = [name for name in names if name]
    check_split(split, pictures)
    found = find_images(pictures, split)
    claim_outputs([], [csv_file, json_file], inputs=files_read(pictures, found))
    cpu.hint_if_slow()
    pipe = open_model(model, dtype=dtype, low_memory=low_memory, adapters=adapters)
    set_noise_level(pipe, noise_level)
    if not names and isinstance(pipe, ClassPipeline):
        names = list(pipe.classes)
    if not names:
        raise click.UsageError('there are no labels: mlx-starflow classify cat.png --labels "a cat,a dog"')
    files = ReadableFiles(pipe, found, size=size, frames=frames)
    result = pipe.classify(
        files,
        names,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        size=size,
        progress=None,
    )
    rows = []
    for number, picture in enumerate(files.files):
        posterior = [float(value) for value in result.posterior[number]]
        rows.append(
            {
                "picture": picture.name,
                "label": result.best[number],
                "probability": max(posterior),
                "margin_nats": float(result.margin[number]) if len(names) > 1 else None,
                "posterior": dict(zip(names, posterior, strict=True)),
            }
        )
    if csv_file is not None:
        write_csv(rows, csv_file)
    if json_file is not None:
        about = {"model": model, "seed": seed, "draws": draws, "labels": names}
        write_json({**about, "pictures": rows, "skipped": files.skipped()}, json_file)
    if Path("-") not in (csv_file, json_file):
        for row in rows:
            margin = "" if row["margin_nats"] is None else f", {row['margin_nats']:.1f} nats ahead"
            click.echo(f"{row['picture']}: {row['label']} ({row['probability']:.1%}{margin})")
