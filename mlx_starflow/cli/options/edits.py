"""The files of what `edit` makes: checked beforehand, written, and reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_starflow.cli.options.outputs import claim_outputs

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from mlx_starflow.editing import Edit, Inpainting
    from mlx_starflow.pipelines import Upscaler

Made = TypeVar("Made", "Edit", "Inpainting")


def and_enlarged(result: Made, upscaler: Upscaler | None) -> Iterator[Made]:
    """The result and then, if there is an upscaler, the same with enlarged images.

    Both are written, one after the other: whoever stops the enlarging keeps what was made.
    """
    yield result
    if upscaler is not None:
        metadata = [upscaler.upscaled(each) for each in result.metadata]
        yield replace(result, images=upscaler(result.images, progress=None), metadata=metadata)


def check_edit(
    output: Path,
    quality: int | None,
    frames: int | None,
    seconds: float | None,
    inputs: list[Path],
    others: list[Path | None],
) -> Path:
    """Where the output goes, if that can be written, and the `others` too; see `claim_outputs`."""
    from mlx_starflow.media.formats import ANIMATIONS, FORMATS
    from mlx_starflow.media.images import check_output

    moves = frames is not None and output.suffix.lower() in ANIMATIONS
    if quality is not None and moves:
        raise click.UsageError(f"--quality is about pictures, and {output} will move: leave it out")
    known = FORMATS if frames is None else tuple(dict.fromkeys([*ANIMATIONS, *FORMATS]))
    check_output(output, known, quality=quality)
    (output,) = claim_outputs([output], others, inputs=inputs)
    if seconds is not None and frames is not None and not moves:
        raise click.UsageError(f"--seconds is about animations, and {output} is none: leave it out, or name a .webp")
    return output


def described(metadata: list[dict[str, Any]], sources: dict[str, str]) -> dict[str, Any]:
    """The metadata of a file that shows all images, made from these files."""
    from mlx_starflow.media.metadata import joined

    return {**joined(metadata), "source": sources}


def write_edit(
    result: Edit,
    output: Path,
    quality: int | None,
    frames: int | None,
    seconds: float | None,
    metadata: dict[str, Any] | None,
) -> None:
    """Write the images of an edit: an animation, if `frames` are asked for and the file moves. Raises StarflowError."""
    from mlx_starflow.media.formats import ANIMATIONS
    from mlx_starflow.media.images import save_animation

    if frames is not None and output.suffix.lower() in ANIMATIONS:
        save_animation(result.images, output, seconds or 0.1, metadata)
    else:
        save_together(result.images, output, quality, metadata, len(result.images) if frames else None)


def report_edit(
    result: Edit, output: Path, frames: int | None, json_file: Path | None, sources: dict[str, str]
) -> None:
    """Say what was made, for people and as JSON."""
    write_edit_json(json_file, output, result.metadata, sources, places=result.places)
    where = ", ".join(f"{place:.2g}" for place in result.places)
    seeds = [seed for each in result.metadata for seed in each.get("seeds", [])]
    drawn = f", seed {', '.join(map(str, dict.fromkeys(seeds)))}" if seeds else ""
    steps = result.metadata[0].get("upscaled", []) if result.metadata else []
    large = f", enlarged {steps[-1]['scale']} times by {steps[-1]['file']}" if steps else ""
    click.echo(
        f"{output}: {'strength' if frames is None else 'path'} {where}{drawn}{large}", err=json_file == Path("-")
    )


def write_edit_json(
    json_file: Path | None, output: Path, metadata: list[dict[str, Any]], sources: dict[str, str], **more: object
) -> None:
    """Say as JSON what was made, where that is asked for."""
    from mlx_starflow.media.tables import write_json

    if json_file is not None:
        write_json({"file": str(output), "source": sources, **more, "made": metadata}, json_file)


def save_together(
    images: list[Image.Image],
    output: Path,
    quality: int | None,
    metadata: dict[str, Any] | None,
    columns: int | None = None,
) -> None:
    """Write images into one file, a grid if there are several. Raises StarflowError."""
    from mlx_starflow.media.images import grid, save_image

    save_image(images[0] if len(images) == 1 else grid(images, columns), output, metadata, quality=quality)


def thinned(values: np.ndarray, most: int = 8) -> np.ndarray:
    """Some of a long list of numbers, evenly spread, with the first and the last."""
    import numpy as np

    chosen = np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))
    return values[chosen]
