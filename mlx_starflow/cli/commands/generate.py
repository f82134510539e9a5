"""`mlx-starflow generate`: prompts to images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.images import make_folder
from mlx_starflow.cli.options.parallel import Ranks, tensor_parallel_option
from mlx_starflow.cli.options.sampling import Size, lora_option, network_options, sampling_options
from mlx_starflow.cli.options.text import Lines
from mlx_starflow.errors import StarflowError


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("--prompt-file", type=Lines(), help="Read prompts from a file, one a line; - is standard input.")
@click.option("-m", "--model", help="demo, a model directory, or a Hub repository.  [default: demo]")
@lora_option
@click.option("-o", "--output", type=click.Path(path_type=Path), default="out.png", show_default=True)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Of each prompt's first picture; drawn and reported if left out."
)
@click.option("-n", "--images", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures a prompt.")
@click.option(
    "--best-of",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sample so many for each picture and keep the one that its prompt fits best, by the flow's likelihoods.",
)
@sampling_options
@click.option("--size", type=Size(), help="In pixels; the size the model was trained at by default.")
@click.option("--separate", is_flag=True, help="One file for each picture (out-1.png, ...) instead of a grid.")
@click.option("--columns", type=click.IntRange(min=1), help="Pictures in a row of the grid.")
@click.option("--metadata/--no-metadata", default=True, help="Say in the PNG how it was made.  [default: metadata]")
@click.option("--from", "source", type=click.Path(path_type=Path), help="Make the pictures of this PNG again.")
@click.option("--save-noise", type=click.Path(path_type=Path), help="Write the noise the pictures came from.")
@click.option("--load-noise", type=click.Path(path_type=Path), help="Start from saved noise instead of a seed.")
@click.option("--steps-dir", type=click.Path(path_type=Path), help="Folder for the picture after each flow block.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Pictures at once.")
@network_options
@click.option(
    "--backend",
    type=click.Choice(["mlx", "torch"]),
    default="mlx",
    show_default=True,
    help="What computes; torch is the PyTorch reference, which makes the same pictures.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where torch computes; cuda if there is one.")
@click.option("--data-parallel", is_flag=True, help="Share the prompts out over the processes of mlx.launch.")
@click.option("-v", "--verbose", is_flag=True, help="Say what each phase cost.")
@tensor_parallel_option
def generate(
    ranks: Ranks,
    prompts: tuple[str, ...],
    prompt_file: list[str] | None,
    model: str | None,
    adapters: tuple[tuple[str, float], ...],
    output: Path,
    seed: int | None,
    images: int,
    best_of: int,
    guidance: float | None,
    temperature: float | None,
    method: str | None,
    verify: bool | None,
    attn_temp: float | None,
    denoise: bool | None,
    size: tuple[int, int] | None,
    source: Path | None,
    separate: bool,
    columns: int | None,
    metadata: bool,
    save_noise: Path | None,
    load_noise: Path | None,
    steps_dir: Path | None,
    batch_size: int,
    dtype: str | None,
    low_memory: bool | None,
    backend: str,
    device: str | None,
    data_parallel: bool,
    verbose: bool,
) -> None:
    """Make pictures of PROMPTS.

    \b
    mlx-starflow generate "a slice of pizza"
    mlx-starflow generate "a red apple" "a rocket" --seed 7 --images 4 -o grid.png
    mlx-starflow generate --from grid.png -o again.png

    An empty prompt ("") gives a picture of anything.
    """
    from mlx_starflow.media import images as media
    from mlx_starflow.media import noise

    recipe: dict[str, Any] = {}
    seeds: int | list[int] | None = seed
    wanted_noise = None
    asked = [*prompts, *(prompt_file or [])]
    if source is not None:
        with ranks.together():
            recipe = _read_recipe(source)
        if asked:
            raise click.UsageError("--from brings its own prompts; leave the others out")
        if best_of > 1:
            raise click.UsageError("--from makes the same pictures again; leave out --best-of")
        asked, model = recipe["prompts"], model or recipe["model"]
        adapters = adapters or recipe.get("adapters", ())
        wanted_noise = recipe.get("noise_sha256")
        if wanted_noise and load_noise is None:
            raise StarflowError(f"{source} was made from a noise file: give it with --load-noise")
        images = len(recipe["seeds"])
        if seed is None and not wanted_noise:
            seeds = recipe["seeds"]
    if not asked:
        raise click.UsageError('there is no prompt: mlx-starflow generate "a red apple"')
    targets = _targets(output, len(asked) * images, separate)
    if data_parallel:
        if ranks.group is not None:
            raise click.UsageError("--data-parallel and --tensor-parallel do not go together")
        if save_noise or load_noise or steps_dir:
            raise click.UsageError("--data-parallel does not go with --save-noise, --load-noise and --steps-dir")
        asked, targets, seeds = _share(asked, targets, images, seeds)
        if not asked:
            return
    with ranks.together():
        if ranks.first:
            for path in targets:
                media.check_output(path)
            if steps_dir is not None:
                make_folder(steps_dir)
    seeds = seeds if load_noise else ranks.seed(seeds)

    from mlx_starflow.pipelines import GenerationSettings, ImagePipeline, Pipeline, VideoPipeline, load

    if backend == "mlx":
        if ranks.first:
            cpu.hint_if_slow()
    elif verify:
        raise StarflowError("--verify needs the mlx backend: leave one of them out")
    opened: Pipeline = load(
        model or "demo",
        dtype=dtype,
        low_memory=low_memory,
        backend=backend,
        device=device,
        adapters=adapters,
        group=ranks.group,
    )
    pipe = opened.image_pipeline if isinstance(opened, VideoPipeline) else opened
    if not isinstance(pipe, ImagePipeline):
        raise StarflowError(f"{opened.name} does not read prompts: use load_flow and sample in Python")
    settings = GenerationSettings.from_dict({**pipe.settings.to_dict(), **recipe.get("settings", {})}).updated(
        guidance=guidance, temperature=temperature, method=method, attn_temp=attn_temp, denoise=denoise, size=size
    )
    given = None
    if load_noise is not None:
        with ranks.together():
            given = noise.load_noise(load_noise, (len(asked) * images * best_of, *pipe.latent_shape(settings.size)))
        if wanted_noise and noise.digest(given) != wanted_noise:
            raise StarflowError(f"{load_noise} is not the noise that {source} was made from")
    ranks.agree_on_method(settings.method, pipe)
    start = None if given is None else noise.digest(given)
    keep_steps, certify = steps_dir is not None, verify is not False
    options = (settings, seeds, images, best_of, start, keep_steps, batch_size, certify)
    ranks.agree({"prompts": asked, "options": options})
    fits: list[str] = []
    if best_of > 1:
        best = pipe.best_of(
            asked,
            best_of,
            images=images,
            seed=seeds if isinstance(seeds, int) else None,
            noise=given,
            settings=settings,
            keep_steps=keep_steps,
            batch_size=batch_size,
            verify=certify,
            progress=None,
        )
        result = best.result
        kept = best.fits[range(len(best.chosen)), best.chosen]
        fits = [f", prompt fit {fit:.0f} nats, the best of {best_of}" for fit in kept]
    else:
        result = pipe.generate(
            asked,
            seed=seeds,
            images=images,
            noise=given,
            settings=settings,
            keep_steps=keep_steps,
            batch_size=batch_size,
            verify=certify,
            progress=None,
        )
    if not ranks.first:
        return
    if save_noise is not None:
        noise.save_noise(result.noise, save_noise)
    if steps_dir is not None:
        for number, steps in enumerate(result.steps, 1):
            media.save_image(media.grid(steps, columns=len(steps)), steps_dir / f"steps-{number}.png")
            for index, step in enumerate(steps):
                media.save_image(step, steps_dir / f"picture-{number}-step-{index}.png")
    if len(targets) == 1:
        single = len(result.images) == 1
        picture = result.images[0] if single else media.grid(result.images, columns or (images if images > 1 else None))
        # The best of each prompt have seeds of their own: no prompts times seeds make this grid again.
        again = metadata and (best_of == 1 or len(asked) == 1)
        how = result.metadata[0] if single else pipe.grid_metadata(result) if again else None
        media.save_image(picture, targets[0], how if metadata else None)
    else:
        for path, picture, how in zip(targets, result.images, result.metadata, strict=True):
            media.save_image(picture, path, how if metadata else None)
    for index, (prompt, each) in enumerate(zip(result.prompts, result.seeds, strict=True)):
        origin = f"noise from {load_noise}" if each is None else f"seed {each}"
        fit = fits[index] if fits else ""
        click.echo(f"{targets[min(index, len(targets) - 1)]}: {prompt!r}, {origin}{fit}")
    if verify:
        for prompt, certificate in zip(result.prompts, result.stats.certificates, strict=True):
            click.echo(f"{prompt!r}: {certificate}")
    if verbose:
        click.echo(str(result.stats))


def _read_recipe(source: Path) -> dict[str, Any]:
    from mlx_starflow.media.metadata import read_metadata

    recipe = read_metadata(source)
    if "frames" in recipe.get("settings", {}):
        raise StarflowError(f"{source} is a video: mlx-starflow video --from {source}")
    if missing := [key for key in ("model", "prompts", "seeds", "settings") if key not in recipe]:
        raise StarflowError(f"{source}: its description lacks {', '.join(missing)}")
    return recipe


def _targets(output: Path, count: int, separate: bool) -> list[Path]:
    if not separate or count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]


def _share(
    asked: list[str], targets: list[Path], images: int, seeds: int | list[int] | None
) -> tuple[list[str], list[Path], int | list[int]]:
    """This process's prompts and files, and the seeds of all."""
    from mlx_starflow.media.noise import draw_seed
    from mlx_starflow.training.loop import distributed

    if len(targets) < len(asked) * images:
        raise StarflowError("--data-parallel writes a file for each picture: give --separate too")
    group = distributed.world()
    with distributed.peers("generate", group, "run the same command again"):
        _, seeds = distributed.from_first({}, draw_seed() if seeds is None else seeds, group)
    chosen = range(group.rank(), len(asked), group.size())
    files = [targets[index * images + number] for index in chosen for number in range(images)]
    return [asked[index] for index in chosen], files, seeds
