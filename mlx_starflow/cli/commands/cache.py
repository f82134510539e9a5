"""`mlx-starflow cache`: pictures and captions, encoded once, for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.interrupt import resumable
from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.cli.options.rules import excludes, option_rules
from mlx_starflow.model_dir.precision import DTYPES

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("data", metavar="DATA")
@click.option("-o", "--output", type=OUTPUT, metavar="CACHE", help="Folder to write.")
@click.option("-m", "--model", default="demo", help="Whose encoders: demo, a folder or a Hub repo.")
@click.option("--size", type=int, help="Side of the pictures in pixels; by default the model's.")
@click.option("--buckets/--square", default=None, help="Nine aspect ratios, or squares; by default as the model.")
@click.option("--views", type=int, default=1, help="Of each picture: its middle, then random parts.")
@click.option("--flip", is_flag=True, help="Mirror every second view. Captions may name left and right, or letters.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float16",
    help="Of the numbers on disk.",
)
@click.option("--batch-size", type=int, default=8, help="Pictures to encode at once.")
@click.option("--split", default="train", help="Take pictures whose metadata has this split.")
@click.option("--caption-column", metavar="NAME", help="Field of the metadata that holds the caption, such as text.")
@click.option("--seed", type=int, default=0, help="Of the random views.")
@click.option("--resume/--no-resume", default=True, help="Go on where an earlier run stopped.")
@click.option("--caption", metavar="TEXT", help="Of pictures that have none, such as 'a photo of rex the dog'.")
@click.option("--check", is_flag=True, help="DATA is a cache: compare the checksums of its files.")
@option_rules(
    excludes(
        "--check",
        *("--output", "--model", "--size", "--buckets", "--square", "--views", "--flip", "--dtype", "--batch-size"),
        *("--split", "--caption-column", "--caption", "--seed", "--resume", "--no-resume"),
    ),
    excludes("--seed", "--views 1", reason="--seed is of random views, the second one on: give --views 2, or more"),
)
def cache(
    data: str,
    output: Path | None,
    model: str,
    size: int | None,
    buckets: bool | None,
    views: int,
    flip: bool,
    dtype: str,
    batch_size: int,
    split: str,
    caption_column: str | None,
    caption: str | None,
    seed: int,
    resume: bool,
    check: bool,
) -> None:
    """Encode the pictures of DATA and their captions once, so that training needs no encoder.

    DATA is a folder of pictures with a .txt file beside each, with a metadata.jsonl or metadata.csv (file_name, text),
    or with a folder for each class; a folder of .tar shards in the webdataset convention; or a data set of the library
    datasets, hf:NAME or saved to disk. Pictures that cannot be read or have no caption are skipped and listed. Ctrl-C
    stops, the same command goes on.

    \b
    mlx-starflow cache my-pictures -o my-cache --model my-model
    mlx-starflow cache my-cache --check
    """
    if check:
        _check(Path(data))
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")

    from mlx_starflow.training.data.cache.build import CacheSettings, build_cache

    settings = CacheSettings(
        size=size,
        buckets=buckets,
        views=views,
        flip=flip,
        dtype=dtype,
        batch_size=batch_size,
        split=split,
        caption_column=caption_column,
        caption=caption,
        seed=seed,
    )
    cpu.hint_if_slow()
    with resumable("stopped: the same command goes on where this one was"):
        summary = build_cache(data, output, model, settings, resume=resume)
    for line in summary.remarks():
        click.echo(line, err=True)
    done = "was finished already" if summary.finished_before else "finished"
    click.echo(
        f"{summary.folder} {done}: {summary.images} pictures, {summary.texts} texts, {summary.bytes / 2**20:.1f} MiB"
    )


def _check(folder: Path) -> None:
    from mlx_starflow.training.data.cache.reading import LatentCache

    found = LatentCache(folder)
    found.check()
    click.echo(f"{folder} is intact: {len(found)} pictures, {found.bytes / 2**20:.1f} MiB")
