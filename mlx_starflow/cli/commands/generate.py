"""`mlx-starflow generate`: prompts to images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options import names
from mlx_starflow.cli.options.classes import ClassOptions, class_options
from mlx_starflow.cli.options.images import metadata_option
from mlx_starflow.cli.options.interrupt import resumable
from mlx_starflow.cli.options.outputs import OUTPUT, claim_outputs, make_folder, overwrite_option
from mlx_starflow.cli.options.parallel import Ranks, tensor_parallel_option
from mlx_starflow.cli.options.pictures import Pictures
from mlx_starflow.cli.options.recorded import chosen_networks
from mlx_starflow.cli.options.rules import excludes, given_options, option_rules
from mlx_starflow.cli.options.sampling import (
    Size,
    lora_option,
    network_options,
    quantize_option,
    sampling_options,
)
from mlx_starflow.cli.options.text import Lines
from mlx_starflow.cli.options.texts import check_not_text, text_options, write_texts
from mlx_starflow.cli.options.upscaling import UPSCALE_RULE, chosen_upscaler, upscale_options
from mlx_starflow.cli.options.vocabulary import Renamed, json_option, quality_option
from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from mlx_starflow.pipelines.recipes import Recipe


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("-p", "--prompt", "named_prompts", multiple=True, help="The same as PROMPTS; give it again for more.")
@click.option("--prompt-file", type=Lines(), help="Read prompts from a file, one a line; - is standard input.")
@class_options
@click.option("-m", "--model", help="demo, a model directory, or a Hub repository.  [default: demo]")
@lora_option
@click.option("-o", "--output", type=OUTPUT, default="out.png", help=f"File to write. {names.HELP}")
@overwrite_option
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    multiple=True,
    help="Of each prompt's first picture; give it again for a picture of each seed. Drawn and reported if left out.",
)
@click.option("-n", "--images", type=click.IntRange(min=1), help="Pictures a prompt.  [default: 1]")
@click.option(
    "--best-of",
    type=click.IntRange(min=1),
    default=1,
    help="Sample so many for each picture and keep the one that its prompt fits best, by the flow's likelihoods.",
)
@sampling_options
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Let a student of the model (see distill) make the pictures; with --method draft it only gives first guesses. "
    "demo is the embedded model's.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Of the student.  [default: 1, of a matching student 4]")
@click.option("--size", type=Size(), help="In pixels; the size the model was trained at by default.")
@click.option("--separate", is_flag=True, help="One file for each picture (out-1.png, ...) instead of a grid.")
@click.option("--columns", type=click.IntRange(min=1), help="Pictures in a row of the grid.")
@text_options
@upscale_options
@quality_option
@metadata_option
@click.option(
    "--like",
    "source",
    cls=Renamed,
    old=("--from",),
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Make the pictures of this file again; what else is given is changed.",
)
@click.option("--save-noise", type=OUTPUT, help="Write the noise the pictures came from.")
@click.option("--load-noise", type=click.Path(path_type=Path), help="Start from saved noise instead of a seed.")
@click.option("--steps-dir", type=OUTPUT, help="Folder for the picture after each flow block.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, help="Pictures at once.")
@network_options
@quantize_option
@click.option(
    "--backend",
    type=click.Choice(["mlx", "torch"]),
    default="mlx",
    help="What computes; torch is the PyTorch reference, which makes the same pictures.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where torch computes; cuda if there is one.")
@click.option("--data-parallel", is_flag=True, help="Share the prompts out over the processes of mlx.launch.")
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Say what each phase cost.")
@tensor_parallel_option
@option_rules(
    UPSCALE_RULE,
    excludes("--load-noise", "--seed", reason="--load-noise is what --seed would draw: leave one of them out"),
    excludes(
        "--like",
        "PROMPTS",
        "--prompt",
        "--prompt-file",
        "--label",
        "--labels",
        reason="--like brings its own prompts; leave the others out",
    ),
    excludes("--denoise-steps", "--no-denoise"),
    excludes("--stochastic", "--no-denoise"),
    excludes("--clip", "--no-denoise"),
    excludes("--like", "--best-of", reason="--like makes the same pictures again; leave out --best-of"),
    excludes("--like", "--images", reason="--like makes as many pictures as there were; leave out --images"),
    excludes("--columns", "--separate", reason="--columns is about the grid that --separate does without"),
    excludes("--tensor-parallel", "--data-parallel"),
    excludes("--data-parallel", "--save-noise", "--load-noise", "--steps-dir", "--json"),
)
def generate(
    ranks: Ranks,
    prompts: tuple[str, ...],
    named_prompts: tuple[str, ...],
    prompt_file: list[str] | None,
    labels: ClassOptions,
    model: str | None,
    adapters: tuple[tuple[str, float], ...],
    output: Path,
    seed: tuple[int, ...],
    images: int | None,
    best_of: int,
    guidance: float | None,
    temperature: float | None,
    method: str | None,
    verify: bool | None,
    attn_temp: float | None,
    denoise: bool | None,
    kv_bits: str | None,
    student: Path | None,
    steps: int | None,
    size: tuple[int, int] | None,
    source: Path | None,
    separate: bool,
    columns: int | None,
    length: int | None,
    fill: bool,
    upscale: str | None,
    upscale_model: str | None,
    quality: int | None,
    metadata: bool,
    save_noise: Path | None,
    load_noise: Path | None,
    steps_dir: Path | None,
    batch_size: int,
    dtype: str | None,
    low_memory: bool | None,
    quantize: str | None,
    backend: str,
    device: str | None,
    data_parallel: bool,
    json_file: Path | None,
    verbose: bool,
) -> None:
    """Make pictures of PROMPTS, or, with a model of text, go on after them.

    \b
    mlx-starflow generate "a fox to the left of a cactus at night"
    mlx-starflow generate "a red apple" "a rocket" --seed 7 --images 4 -o grid.png
    mlx-starflow generate "a cat" --seed 1 --seed 5 -o "{prompt}-{seed}.png"
    mlx-starflow generate --like grid.png -o again.png
    mlx-starflow generate "a red cube" --model my-model --student my-student
    mlx-starflow generate --model my-tarflow --label 3 --images 8 --guidance 1.5
    mlx-starflow generate --model my-text-flow "In the beginning" --length 400 --temperature 0.8
    mlx-starflow generate --model my-text-flow "And it came to ____ in those days" --fill

    A TarFlow's or an iTARFlow's prompts are classes, by their names or numbers: --label 3, or just 3.

    An empty prompt ("") gives a picture of anything.
    """
    from mlx_starflow.model_dir.directory import is_text_model

    if model is not None and is_text_model(model):
        write_texts(
            [*prompts, *named_prompts, *(prompt_file or [])] or [""],
            model=model,
            output=output if given_options("--output") else None,
            json_file=json_file,
            seeds=seed,
            texts=images or 1,
            length=length,
            fill=fill,
            temperature=temperature,
            method=method,
            verify=bool(verify),
            dtype=dtype,
            verbose=verbose,
        )
        return
    check_not_text(model or "demo")
    from mlx_starflow.media import images as media
    from mlx_starflow.media import noise
    from mlx_starflow.media.outputs import STDOUT
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.planning.limits import check_count

    recipe: Recipe | None = None
    download = model is not None or source is None
    seeds: int | list[int] | None = list(seed) if len(seed) > 1 else next(iter(seed), None)
    asked = [*prompts, *named_prompts, *(prompt_file or []), *labels.prompts]
    if source is not None:
        from mlx_starflow.pipelines.recipes import Recipe

        with ranks.together():
            recipe = Recipe.read(source)
        if recipe.noise_sha256 and load_noise is None:
            raise StarflowError(f"{source} was made from a noise file: give it with --load-noise")
        asked = recipe.prompts
        model, adapters = chosen_networks(recipe, model, adapters, ranks, student)
        images, columns = len(recipe.seeds), columns or (None if separate else recipe.columns)
        if seeds is None:
            seeds = recipe.given_seeds
    if len(seed) > 1:
        if given_options("--images", "--best-of"):
            raise click.UsageError("--seed given again makes a picture of each seed: leave out --images and --best-of")
        images = len(seed)
    images = images or 1
    if not asked:
        raise click.UsageError('there is no prompt: mlx-starflow generate "a red apple" (or "", for none)')
    count = len(asked) * images
    check_count(count * best_of)
    if "seed" in names.fields(output) and not load_noise:
        if best_of > 1:
            raise click.UsageError("with --best-of the seed of a picture is known too late for its name: use {index}")
        if seeds is None and data_parallel:
            raise click.UsageError("with --data-parallel names with {seed} need --seed")
        seeds = noise.draw_seed() if seeds is None and ranks.group is None else ranks.seed(seeds)
    own = seeds if isinstance(seeds, list) else [None if seeds is None else seeds + k for k in range(images)]
    requests = [(prompt, each) for prompt in asked for each in own]
    if names.fields(output):
        if given_options("--columns"):
            raise click.UsageError(f"--columns is about a grid, and {output} makes a file for each picture")
        columns, targets = None, names.filled(output, requests)
    else:
        targets = _targets(output, count, separate)
    if columns is not None and count == 1:
        raise click.UsageError("--columns is about a grid of several pictures, such as with --images 4: leave it out")
    if data_parallel:
        asked, targets, seeds = _share(asked, targets, images, seeds)
        if not asked:
            return
    upscaler = None
    with ranks.together():
        if ranks.first:
            upscaler = chosen_upscaler(upscale, upscale_model, recipe)
            for path in targets:
                media.check_output(path, quality=quality)
            read = [path for path in (source, load_noise) if path is not None]
            # Processes that share the work out could not agree on a number.
            free, fixed = ([], targets) if data_parallel else (targets, [])
            free = claim_outputs(free, [*fixed, save_noise, json_file], folders=[steps_dir], inputs=read)
            targets = free or fixed
            if steps_dir is not None:
                make_folder(steps_dir)
                sheets = [steps_dir / f"steps-{number}.png" for number in range(1, count + 1)]
                claim_outputs(targets, sheets, inputs=read)
    seeds = seeds if load_noise else ranks.seed(seeds)

    from mlx_starflow.model_dir.adapters import for_flow_and_student
    from mlx_starflow.pipelines import Pipeline, VideoPipeline, load
    from mlx_starflow.pipelines.image_maker import ImageMaker

    if backend == "mlx":
        if ranks.first:
            cpu.hint_if_slow()
    elif verify:
        raise StarflowError("--verify needs the mlx backend: leave one of them out")
    with ranks.together():
        of_flow, of_student = for_flow_and_student(adapters)
        if of_student and student is None and not (recipe and recipe.settings.get("student")):
            raise StarflowError(f"{of_student[0][0]} is an adapter of a student: give that with --student DIR")
    opened: Pipeline = load(
        "demo" if model is None else model,
        dtype=dtype,
        low_memory=low_memory,
        backend=backend,
        device=device,
        adapters=of_flow,
        group=ranks.group,
        download=download,
        quantize=quantize,
        student_adapters=of_student,
    )
    pipe = opened.image_pipeline if isinstance(opened, VideoPipeline) else opened
    if not isinstance(pipe, ImageMaker):
        raise StarflowError(f"{opened.name} does not read prompts: use load_flow and sample in Python")
    recorded = recipe.settings_with(pipe.plan, pipe.backend.methods) if recipe else {}
    chosen = type(pipe.settings).from_dict({**pipe.settings.to_dict(), **recorded})
    settings = pipe.with_student(chosen, student, guidance, temperature, steps, method).updated(
        attn_temp=attn_temp, denoise=denoise, size=size, kv_bits=kv_bits
    )
    settings = labels.apply(settings, opened.name)
    given = None
    if load_noise is not None:
        with ranks.together():
            given = noise.load_noise(load_noise, (len(asked) * images * best_of, *pipe.noise_shape(settings.size)))
        if recipe and recipe.noise_sha256 not in (None, noise.digest(given)):
            raise StarflowError(f"{load_noise} is not the noise that {source} was made from")
    ranks.agree_on_method(settings.method)
    start = None if given is None else noise.digest(given)
    # What is sampled one token after another, with keys and values as they are, is right by construction: its
    # certificate would only say so.
    certify = pipe.method(settings) != "sequential" or bool(settings.cache_bits) if verify is None else verify
    if verify and settings.samples_by_student:
        raise StarflowError("what a student makes is not exact, and has no certificate: leave --verify out")
    keep_steps = steps_dir is not None
    options = (settings, seeds, images, best_of, start, keep_steps, batch_size, certify)
    ranks.agree({"prompts": asked, "options": options})
    stream = pipe.stream(
        asked,
        seed=seeds,
        images=images,
        best_of=best_of,
        noise=given,
        settings=settings,
        keep_steps=keep_steps,
        batch_size=batch_size,
        verify=certify,
        progress=None,
    )
    if not ranks.first:
        for _ in stream:
            pass
        return
    pictures = Pictures(
        pipe,
        stream,
        targets,
        images=images,
        columns=columns,
        metadata=metadata,
        best_of=best_of,
        save_noise=save_noise,
        steps_dir=steps_dir,
        noise_file=load_noise,
        upscaler=upscaler,
        quality=quality,
        quiet=json_file == STDOUT,
    )
    with resumable(lambda: f"stopped: {pictures.summary()}"), pictures:
        for made in stream:
            pictures.add(made)
    if json_file is not None:
        write_json(pictures.table(), json_file)
    if verify:
        for made in pictures.made:
            click.echo(f"{made.prompt!r}: {made.certificate}", err=pictures.quiet)
    if verbose:
        click.echo(str(stream.stats), err=pictures.quiet)


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
