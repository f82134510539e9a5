"""`mlx-starflow calibrate`: what the likelihood of a model's own images is."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.images import ReadableFiles, images_argument, noise_options
from mlx_starflow.cli.options.outputs import claim_outputs, files_read, overwrite_option
from mlx_starflow.cli.options.vocabulary import json_option


@click.command()
@images_argument
@click.option("-m", "--model", required=True, help="A model directory.")
@click.option("--split", default="train", help='Of a metadata.jsonl: only lines with this "split".')
@click.option("--limit", type=click.IntRange(min=2), help="Most pictures, spread evenly; all by default.")
@json_option
@overwrite_option
@noise_options
def calibrate(
    pictures: tuple[Path, ...],
    model: str,
    split: str,
    limit: int | None,
    json_file: Path | None,
    draws: int,
    seed: int,
    batch_size: int,
) -> None:
    """Measure the likelihood of PICTURES, such as a model was trained on, and keep it in the model's directory.

    \b
    mlx-starflow calibrate my-pictures -m my-model

    Then mlx-starflow score says how unusual a picture's likelihood is: its deviation from the mean of these pictures,
    in their standard deviations. With captions there are statistics with and without a prompt.
    """
    from mlx_starflow.likelihood import calibrate as measure
    from mlx_starflow.likelihood.calibration import describe
    from mlx_starflow.media.image_files import find_images
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.model_dir.transaction import locked
    from mlx_starflow.pipelines import open_model

    found = find_images(pictures, split)
    claim_outputs([], [json_file], inputs=files_read(pictures, found))
    if limit is not None and limit < len(found):
        found = [found[number * len(found) // limit] for number in range(limit)]
    cpu.hint_if_slow()
    pipe = open_model(model)
    # From the start, so that no measurement is lost to another writer.
    click.get_current_context().with_resource(locked(pipe.directory))
    files = ReadableFiles(pipe, found, videos=False)
    data = pipe.to_data(files)
    pipe.release("vae")
    captions = [each.caption for each in files.files]
    measured = measure(
        pipe,
        data,
        captions if all(captions) else None,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        progress=None,
    )
    path = measured.save(pipe.directory)
    if json_file is not None:
        about = {"model": model, "file": str(path), "pictures": len(data), "draws": draws, "seed": seed}
        nll = {kind: statistics.to_dict() for kind, statistics in measured.nll.items()}
        write_json({**about, "unit": f"nats per {pipe.dimension}", "nll": nll, "skipped": files.skipped()}, json_file)
    if json_file == Path("-"):
        return
    for kind, statistics in measured.nll.items():
        click.echo(
            f"{kind}: {describe(statistics)} nats per {pipe.dimension} (mean and spread of {len(data)} pictures)"
        )
    click.echo(f"written: {path}")
