"""`mlx-starflow edit`: inpaint, re-prompt, vary and interpolate images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.edits import (
    and_enlarged,
    check_edit,
    described,
    report_edit,
    save_together,
    thinned,
    write_edit,
    write_edit_json,
)
from mlx_starflow.cli.options.groups import Group
from mlx_starflow.cli.options.images import inversion_option, metadata_option, model_options
from mlx_starflow.cli.options.outputs import OUTPUT, overwrite_option
from mlx_starflow.cli.options.rules import excludes, needs, option_rules
from mlx_starflow.cli.options.sampling import Number, with_options
from mlx_starflow.cli.options.upscaling import UPSCALE_RULE, chosen_upscaler, upscale_options
from mlx_starflow.cli.options.vocabulary import drawn_seed_option, json_option, quality_option

if TYPE_CHECKING:
    from PIL import Image

    from mlx_starflow.pipelines import Pipeline

PICTURE = click.Path(path_type=Path)

output_options = with_options(
    click.option("-o", "--output", type=OUTPUT, default="out.png", help="File to write."),
    overwrite_option,
    upscale_options,
    quality_option,
    json_option,
)
batch_option = click.option("--batch-size", type=click.IntRange(min=1), default=8, help="Pictures at once.")
count_option = click.option("-n", "--images", type=click.IntRange(min=1), default=1, help="Pictures to make.")
path_options = with_options(
    click.option("--frames", type=click.IntRange(2, 1_000_000), help="Pictures on the way there; .webp and .gif move."),
    click.option("--seconds", type=Number(0.01, 100), help="Of each frame.  [default: 0.1]"),
)


@click.group(cls=Group)
def edit() -> None:
    """Edit a picture by the noise that it comes from.

    Every picture is cut about its middle and resized to what the model was trained on (or --size).
    """


@edit.command()
@click.argument("picture", type=PICTURE)
@click.option("--mask", required=True, help="The free part: x,y,w,h in pixels, or a picture that is white there.")
@click.option("-p", "--prompt", default="", help="What is on the whole picture.")
@output_options
@click.option(
    "--feather",
    type=click.IntRange(min=0),
    metavar="PIXELS",
    help="About the mask, over which what is kept gives way to what is painted.  [default: 1/16 of the shorter side]",
)
@click.option("--steps", type=click.IntRange(min=1), default=10, help="In each round.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    help="Between them the picture is encoded anew, with what was painted.",
)
@click.option(
    "--strength",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.5,
    help="Of steps: how far each leads towards a likely picture, and how much noise it adds at first.",
)
@count_option
@drawn_seed_option
@metadata_option
@inversion_option
@model_options
@option_rules(UPSCALE_RULE)
def inpaint(
    picture: Path,
    mask: str,
    prompt: str,
    output: Path,
    upscale: str | None,
    upscale_model: str | None,
    quality: int | None,
    json_file: Path | None,
    feather: int | None,
    steps: int,
    rounds: int,
    strength: float,
    images: int,
    seed: int | None,
    metadata: bool,
    method: str | None,
    model: str,
    adapters: tuple[tuple[str, float], ...],
    size: tuple[int, int] | None,
    dtype: str | None,
    low_memory: bool | None,
) -> None:
    """Paint a part of PICTURE anew, so that it goes with the rest.

    \b
    mlx-starflow edit inpaint cat.png --mask 64,0,64,128 --prompt "a cat" -o whole.png
    """
    from mlx_starflow.editing import read_mask

    image = _read(picture)
    free = read_mask(mask, image.size)
    output = check_edit(output, quality, None, None, [picture, Path(mask)], [json_file])
    upscaler = chosen_upscaler(upscale, upscale_model)
    pipe, seed = _open(model, adapters, dtype, low_memory), _drawn(seed)
    result = pipe.inpaint(
        image,
        free,
        prompt,
        steps=steps,
        rounds=rounds,
        strength=strength,
        feather=feather,
        images=images,
        seed=seed,
        size=size,
        method=method,
        progress=None,
    )
    sources = {"picture": str(picture), "mask": mask}
    for made in and_enlarged(result, upscaler):
        save_together(made.images, output, quality, described(made.metadata, sources) if metadata else None)
    write_edit_json(json_file, output, made.metadata, sources, nll=result.nll.tolist())
    for number in range(images):
        nll = " ".join(f"{each:.3f}" for each in thinned(result.nll[:, number]))
        click.echo(f"{output}: seed {seed + number}, {nll} nats per {pipe.dimension}", err=json_file == Path("-"))


@edit.command()
@click.argument("picture", type=PICTURE)
@click.option("--from", "source", default="", help="What is on the picture.")
@click.option("--to", "target", required=True, help="What shall be.")
@click.option(
    "--strength",
    type=click.FloatRange(min=0),
    default=1.0,
    help="0 gives the picture back, 1 is the new prompt's, more leads further away from the old one.",
)
@path_options
@output_options
@batch_option
@metadata_option
@inversion_option
@model_options
@option_rules(UPSCALE_RULE, needs("--seconds", "--frames"))
def reprompt(
    picture: Path,
    source: str,
    target: str,
    strength: float,
    frames: int | None,
    seconds: float | None,
    output: Path,
    upscale: str | None,
    upscale_model: str | None,
    quality: int | None,
    json_file: Path | None,
    batch_size: int,
    metadata: bool,
    method: str | None,
    model: str,
    adapters: tuple[tuple[str, float], ...],
    size: tuple[int, int] | None,
    dtype: str | None,
    low_memory: bool | None,
) -> None:
    """Make of PICTURE what another prompt says.

    \b
    mlx-starflow edit reprompt apple.png --from "a red apple" --to "a green apple" -o green.png
    mlx-starflow edit reprompt dog.png --from "a dog" --to "a cat" --frames 16 -o dog-cat.webp
    """
    image = _read(picture)
    output = check_edit(output, quality, frames, seconds, [picture], [json_file])
    upscaler = chosen_upscaler(upscale, upscale_model)
    result = _open(model, adapters, dtype, low_memory).reprompt(
        image,
        source,
        target,
        _places(strength, frames),
        size=size,
        batch_size=batch_size,
        method=method,
        progress=None,
    )
    sources = {"picture": str(picture)}
    for made in and_enlarged(result, upscaler):
        write_edit(made, output, quality, frames, seconds, described(made.metadata, sources) if metadata else None)
    report_edit(made, output, frames, json_file, sources)


@edit.command()
@click.argument("picture", type=PICTURE)
@click.option("-p", "--prompt", default="", help="What is on the picture.")
@click.option(
    "--strength",
    type=click.FloatRange(min=0, max=1),
    default=0.7,
    help="0 gives the picture back, 1 has nothing of it.",
)
@click.option("--temperature", type=click.FloatRange(min=0), help="Scale of the new noise; the model's own by default.")
@count_option
@drawn_seed_option
@path_options
@output_options
@batch_option
@metadata_option
@inversion_option
@model_options
@option_rules(
    UPSCALE_RULE,
    needs("--seconds", "--frames"),
    excludes("--frames", "--images", reason="--frames shows the way to one picture: leave out --images"),
)
def vary(
    picture: Path,
    prompt: str,
    strength: float,
    temperature: float | None,
    images: int,
    seed: int | None,
    frames: int | None,
    seconds: float | None,
    output: Path,
    upscale: str | None,
    upscale_model: str | None,
    quality: int | None,
    json_file: Path | None,
    batch_size: int,
    metadata: bool,
    method: str | None,
    model: str,
    adapters: tuple[tuple[str, float], ...],
    size: tuple[int, int] | None,
    dtype: str | None,
    low_memory: bool | None,
) -> None:
    """Make pictures like PICTURE.

    \b
    mlx-starflow edit vary tulip.png --prompt "a tulip" --temperature 1 --images 4 -o tulips.png

    Below a strength of 0.5 the embedded model's pictures hardly change.
    """
    image = _read(picture)
    output = check_edit(output, quality, frames, seconds, [picture], [json_file])
    upscaler = chosen_upscaler(upscale, upscale_model)
    result = _open(model, adapters, dtype, low_memory).vary(
        image,
        prompt,
        _places(strength, frames),
        images=images,
        temperature=temperature,
        seed=_drawn(seed),
        size=size,
        batch_size=batch_size,
        method=method,
        progress=None,
    )
    sources = {"picture": str(picture)}
    for made in and_enlarged(result, upscaler):
        write_edit(made, output, quality, frames, seconds, described(made.metadata, sources) if metadata else None)
    report_edit(made, output, frames, json_file, sources)


@edit.command()
@click.argument("first", type=PICTURE)
@click.argument("second", type=PICTURE)
@click.option("--from", "source", default="", help="What is on the first picture.")
@click.option("--to", "target", default="", help="What is on the second picture.")
@path_options
@output_options
@batch_option
@metadata_option
@inversion_option
@model_options
@option_rules(UPSCALE_RULE)
def interpolate(
    first: Path,
    second: Path,
    source: str,
    target: str,
    frames: int | None,
    seconds: float | None,
    output: Path,
    upscale: str | None,
    upscale_model: str | None,
    quality: int | None,
    json_file: Path | None,
    batch_size: int,
    metadata: bool,
    method: str | None,
    model: str,
    adapters: tuple[tuple[str, float], ...],
    size: tuple[int, int] | None,
    dtype: str | None,
    low_memory: bool | None,
) -> None:
    """Show pictures on the way from FIRST to SECOND; 16 if --frames does not say otherwise.

    \b
    mlx-starflow edit interpolate heart.png car.png --from "red heart" --to car -o way.webp
    """
    frames = frames or 16
    images = _read(first), _read(second)
    output = check_edit(output, quality, frames, seconds, [first, second], [json_file])
    upscaler = chosen_upscaler(upscale, upscale_model)
    result = _open(model, adapters, dtype, low_memory).interpolate(
        *images,
        (source, target),
        _places(1.0, frames),
        size=size,
        batch_size=batch_size,
        method=method,
        progress=None,
    )
    sources = {"first": str(first), "second": str(second)}
    for made in and_enlarged(result, upscaler):
        write_edit(made, output, quality, frames, seconds, described(made.metadata, sources) if metadata else None)
    report_edit(made, output, frames, json_file, sources)


# ---- what they share


def _read(path: Path) -> Image.Image:
    from mlx_starflow.media.image_files import read_image

    return read_image(path)


def _open(model: str, adapters: tuple[tuple[str, float], ...], dtype: str | None, low_memory: bool | None) -> Pipeline:
    from mlx_starflow.pipelines import open_model

    cpu.hint_if_slow()
    return open_model(model, dtype=dtype, low_memory=low_memory, adapters=adapters)


def _places(end: float, frames: int | None) -> list[float]:
    return [end] if frames is None else [end * number / (frames - 1) for number in range(frames)]


def _drawn(seed: int | None) -> int:
    from mlx_starflow.media.noise import draw_seed

    return draw_seed() if seed is None else seed
