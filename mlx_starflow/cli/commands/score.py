"""`mlx-starflow score`: how likely images and videos are, and where they surprise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from mlx_starflow.cli.options.outputs import OUTPUT, claim_outputs, files_read, make_folder, overwrite_option
from mlx_starflow.cli.options.rules import excludes, given_options, needs, option_rules
from mlx_starflow.cli.options.texts import score_texts

if TYPE_CHECKING:
    from mlx_starflow.likelihood import CalibrationStatistics, ImageModel, ImageOrVideo, Score
    from mlx_starflow.media.image_files import ImageFile

REDDEST = 6.0
"""Standard deviations at the end of the colours of a map of typicality."""


@click.command()
@images_argument
@click.option("-p", "--prompt", default="", help="What is on the pictures; of a TarFlow the class.")
@click.option("--captions", is_flag=True, help="Take each picture's own caption from its folder as its prompt.")
@click.option("--split", help='Of folders with a metadata.jsonl: only lines with this "split".')
@click.option("--map", "map_dir", type=OUTPUT, metavar="DIR", help="Write heat-maps to this folder.")
@click.option(
    "--map-of",
    type=click.Choice(["surprise", "typicality"]),
    default="surprise",
    help="Nats of each token, or how unusual they are there.",
)
@table_options
@overwrite_option
@noise_options
@noise_level_option
@model_options
@frames_option
@option_rules(
    excludes("--captions", "--prompt", reason="--captions brings each picture's own prompt: leave out --prompt"),
    needs("--map-of", "--map"),
    excludes("--csv -", "--json -", reason="--csv - and --json - would be printed together: write one to a file"),
)
def score(
    pictures: tuple[Path, ...],
    prompt: str,
    captions: bool,
    split: str | None,
    map_dir: Path | None,
    map_of: str,
    csv_file: Path | None,
    json_file: Path | None,
    draws: int,
    seed: int,
    batch_size: int,
    noise_level: float | None,
    model: str,
    adapters: tuple[tuple[str, float], ...],
    size: tuple[int, int] | None,
    dtype: str | None,
    low_memory: bool | None,
    frames: int | None,
) -> None:
    """Score PICTURES, files or folders of them: exact negative log-likelihood in nats per dimension.

    With a model of text, score text files: bits per character.

    \b
    mlx-starflow score cat.png --prompt "a cat"
    mlx-starflow score photos --map maps --csv scores.csv
    mlx-starflow score street.mp4 -m my-video-model --map maps
    mlx-starflow score book.txt -m my-text-flow

    A model that makes videos scores videos too, with each latent frame given those before it; pictures are stills.

    Lower is more likely. The likelihood is that of the picture with the noise that the flow was trained with; it is
    averaged over draws of that noise, whose standard error is printed. A low value alone does not make a picture
    usual: see the deviation from the model's own pictures (mlx-starflow calibrate), in standard deviations.
    """
    from mlx_starflow.model_dir.directory import is_text_model

    if is_text_model(model):
        score_texts(
            pictures,
            model=model,
            draws=draws if given_options("--draws") else None,
            seed=seed,
            csv_file=csv_file,
            json_file=json_file,
            dtype=dtype,
        )
        return
    from mlx_starflow.likelihood import CalibrationStatistics
    from mlx_starflow.likelihood.scores import score_data
    from mlx_starflow.media.image_files import find_images
    from mlx_starflow.media.outputs import check_outputs
    from mlx_starflow.media.tables import write_csv, write_json
    from mlx_starflow.pipelines import VideoPipeline, open_model
    from mlx_starflow.sampling.bars import Bar

    check_split(split, pictures)
    found = find_images(pictures, split)
    names = [] if map_dir is None else [map_dir / f"{Path(each.name).stem}.{map_of}.png" for each in found]
    maps = [path for path in dict.fromkeys(names) if path.exists()]
    read = [*files_read(pictures, found)]
    check_outputs([csv_file, json_file, *maps], folders=[map_dir], inputs=read)
    claim_outputs([], [csv_file, json_file], inputs=read)
    if map_dir is not None:
        make_folder(map_dir)
    cpu.hint_if_slow()
    pipe = open_model(model, dtype=dtype, low_memory=low_memory, adapters=adapters)
    set_noise_level(pipe, noise_level)
    files = ReadableFiles(pipe, found, size=size, frames=frames)
    # They are of the level that the model scores at unless told otherwise.
    statistics = CalibrationStatistics.find(pipe.directory) if noise_level is None else None
    if map_of == "typicality" and map_dir is not None and isinstance(pipe, VideoPipeline) and found[0].is_video:
        raise click.UsageError("--map-of typicality is about pictures: a video has maps of surprise")
    if map_of == "typicality" and map_dir is not None and statistics is None:
        raise click.UsageError("there are no calibration statistics to compare with: run mlx-starflow calibrate first")
    data = pipe.to_data_each(Bar(files, desc="reading", unit="picture", total=len(found), disable=None), size)
    pipe.release("vae")
    found = files.files
    prompts = [each.caption for each in found] if captions else [prompt] * len(found)
    scores = score_data(pipe, data, prompts, draws=draws, seed=seed, batch_size=batch_size, progress=None)
    rows = [_row(*each, statistics) for each in zip(found, prompts, scores, strict=True)]
    if map_dir is not None:
        again = ReadableFiles(pipe, found, size=size, frames=frames)
        _write_maps(pipe, again, found, scores, rows, size, map_dir, map_of)
    if csv_file is not None:
        write_csv(_with_frames(rows), csv_file)
    if json_file is not None:
        unit = f"nats per {pipe.dimension}"
        write_json(
            {"model": model, "seed": seed, "unit": unit, "pictures": rows, "skipped": files.skipped()}, json_file
        )
    if Path("-") not in (csv_file, json_file):
        _print(rows, pipe.dimension)


def _row(picture: ImageFile, prompt: str, result: Score, statistics: CalibrationStatistics | None) -> dict[str, Any]:
    # A picture without a caption was scored without a prompt, whatever the others have.
    prompted = bool(prompt.strip())
    row = {"picture": picture.name, "prompt": prompt, **result.to_dict()}
    if statistics is not None and not result.frames and ("prompted" in statistics.nll or not prompted):
        typicality = statistics.typicality(result, prompted)
        row["deviation"] = typicality.deviation
        row["deviation_map"] = None if typicality.map is None else typicality.map.tolist()
    return row


def _with_frames(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same lines; after a video's, one for each latent frame, by its number."""
    if "frames" not in rows[0]:
        return rows
    lines: list[dict[str, Any]] = []
    for row in rows:
        own = {**row, "dimensions": row["dimensions"] // len(row["frames"])}
        frames = [{**own, "latent_frame": number, **frame} for number, frame in enumerate(row["frames"])]
        lines += [{**row, "latent_frame": ""}, *frames]
    return lines


def _print(rows: list[dict[str, Any]], dimension: str) -> None:
    import numpy as np

    from mlx_starflow.likelihood import standard_error

    width = max(7, *(len(row["picture"]) for row in rows))
    more = [key for key in ("bits_per_pixel_dimension", "deviation") if any(key in row for row in rows)]
    titles = {"bits_per_pixel_dimension": "bits/pixel dim", "deviation": "deviation"}
    click.echo(f"{'picture':<{width}}  {'NLL':>8}  {'+-':>7}" + "".join(f"  {titles[key]:>14}" for key in more))
    for row in rows:
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        values = "".join(f"  {row[key]:14.3f}" if key in row else " " * 16 for key in more).rstrip()
        click.echo(f"{row['picture']:<{width}}  {row['nll']:8.4f}  {error:>7}{values}")
        if "frames" in row:
            click.echo("  by latent frame: " + " ".join(f"{frame['nll']:.3f}" for frame in row["frames"]))
    if len(rows) > 1:
        nll = np.array([row["nll"] for row in rows])
        click.echo(f"{f'mean of {len(rows)}':<{width}}  {nll.mean():8.4f}  {standard_error(nll):7.4f}")
    click.echo(f"NLL in nats per {dimension}, {rows[0]['draws']} draws of the training noise")


def _write_maps(
    model: ImageModel,
    items: Iterable[ImageOrVideo],
    found: list[ImageFile],
    scores: list[Score],
    rows: list[dict[str, Any]],
    size: tuple[int, int] | None,
    folder: Path,
    kind: str,
) -> None:
    import numpy as np
    from PIL import Image

    from mlx_starflow.errors import StarflowError
    from mlx_starflow.likelihood import heat_map
    from mlx_starflow.likelihood.heatmap import heat_map_frames
    from mlx_starflow.media.formats import ANIMATIONS
    from mlx_starflow.media.images import save_image
    from mlx_starflow.media.videos import VideoWriter
    from mlx_starflow.pipelines import VideoPipeline

    if kind == "typicality":
        if any(row.get("deviation_map") is None for row in rows):
            raise StarflowError(
                "the pictures that the model was calibrated with had another size, or no captions: no map can be "
                "compared with theirs"
            )
        maps = [np.abs(row["deviation_map"]) for row in rows]
        low, high, unit = 0.0, REDDEST, "standard deviations"
    else:
        maps = [each.surprise for each in scores]
        low, high, unit = min(map(np.min, maps)), max(map(np.max, maps)), "nats per token"
    taken: set[str] = set()
    for picture, item, values in zip(found, items, maps, strict=True):
        stem = name = Path(picture.name).stem
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        fitted, ends = model.fit(item, size), (float(low), float(high))
        if isinstance(fitted, Image.Image):
            save_image(heat_map(fitted, values, *ends, unit=unit), folder / f"{name}.{kind}.png")
            continue
        assert isinstance(model, VideoPipeline)  # others take no videos
        own, step = Path(picture.name).suffix.lower(), model.vae_config.temporal_downscale
        path = folder / f"{name}.{kind}{own if own in ANIMATIONS else '.mp4'}"
        with VideoWriter(path, model.settings.fps) as writer:
            for image in heat_map_frames(fitted, values, *ends, step, unit=unit):
                writer.add(image)
