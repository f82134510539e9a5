"""`mlx-starflow video`: prompts, images and videos to videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.images import metadata_option
from mlx_starflow.cli.options.outputs import OUTPUT, claim_outputs, overwrite_option
from mlx_starflow.cli.options.parallel import Ranks, tensor_parallel_option
from mlx_starflow.cli.options.recorded import chosen_networks
from mlx_starflow.cli.options.rules import excludes, needs, option_rules
from mlx_starflow.cli.options.sampling import Size, lora_option, network_options, quantize_option, sampling_options
from mlx_starflow.cli.options.upscaling import UPSCALE_RULE, chosen_upscaler, upscale_options
from mlx_starflow.cli.options.vocabulary import Renamed, json_option
from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from PIL import Image

    from mlx_starflow.media.videos import VideoWriter
    from mlx_starflow.pipelines import VideoStream
    from mlx_starflow.pipelines.recipes import Recipe
    from mlx_starflow.sampling.progress import Progress

PATH = click.Path(path_type=Path)
SOURCES = ("image", "video", "extend")


@click.command()
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "named_prompt", help="The same as PROMPT.")
@click.option("-m", "--model", help="A model directory, or a Hub repository, of a model that makes videos.")
@lora_option
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    default="out.mp4",
    help="An .mp4, .mov, .m4v, .webp or .gif file; or, without a suffix, a folder for the frames.",
)
@overwrite_option
@click.option("--image", type=PATH, help="A picture that the video begins with.")
@click.option("--video", type=PATH, help="A video, or folder of frames, to make this one from.")
@click.option("--extend", type=PATH, help="A video, or folder of frames, to go on from.")
@click.option(
    "--frames",
    type=click.IntRange(min=1),
    help="1 + a multiple of 4; with --extend, of the new ones, a multiple of 4. As the model was trained by default.",
)
@click.option("--fps", type=click.IntRange(min=1), help="Frames a second; as the model was trained by default.")
@click.option("--size", type=Size(), help="In pixels; see --ratio.")
@click.option("--ratio", help="Shape, at the area that the model was trained at.  [default: 16:9, or as what is given]")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Latent frames, of 4 frames each, that a continuation, or a later window of a long video, begins with; 16 by "
    "default.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Drawn and reported if left out.")
@sampling_options
@click.option("--stream", is_flag=True, help="Write each frame as soon as it is finished, to be watched meanwhile.")
@click.option(
    "--preview",
    is_flag=True,
    help="With --stream, write a picture of each latent frame at once, cleaned without those after it, to a video "
    "beside: out-preview.mp4 for out.mp4. The video itself stays the same.",
)
@click.option(
    "--keep-source/--no-keep-source",
    default=None,
    help="With --extend, begin the file with the video it goes on from.  [default: keep-source]",
)
@click.option("--crf", type=click.IntRange(0, 51), help="Quality of H.264, 0 the best.  [default: 18]")
@upscale_options
@metadata_option
@click.option(
    "--like",
    "source",
    cls=Renamed,
    old=("--from",),
    type=PATH,
    metavar="FILE",
    help="Make this video again; what else is given is changed.",
)
@click.option("--save-noise", type=OUTPUT, help="Write the noise the video came from.")
@click.option("--load-noise", type=PATH, help="Start from saved noise instead of a seed.")
@network_options
@quantize_option
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Say what each phase cost.")
@tensor_parallel_option
@option_rules(
    UPSCALE_RULE,
    excludes("--size", "--ratio", reason="--size and --ratio both say the shape; leave one of them out"),
    excludes("--load-noise", "--seed", reason="--load-noise is what --seed would draw: leave one of them out"),
    excludes("--like", "PROMPT", "--prompt", reason="--like brings its own prompt; leave the other out"),
    excludes("PROMPT", "--prompt", reason="PROMPT and --prompt are the same: leave one of them out"),
    excludes("--image", "--video", "--extend"),
    excludes("--video", "--extend"),
    needs("--preview", "--stream"),
    needs("--keep-source", "--extend"),
    needs("--no-keep-source", "--extend"),
)
def video(
    ranks: Ranks,
    prompt: str | None,
    named_prompt: str | None,
    model: str | None,
    adapters: tuple[tuple[str, float], ...],
    output: Path,
    image: Path | None,
    video: Path | None,
    extend: Path | None,
    frames: int | None,
    fps: int | None,
    size: tuple[int, int] | None,
    ratio: str | None,
    context: int | None,
    seed: int | None,
    guidance: float | None,
    temperature: float | None,
    method: str | None,
    verify: bool | None,
    attn_temp: float | None,
    denoise: bool | None,
    kv_bits: str | None,
    stream: bool,
    preview: bool,
    keep_source: bool | None,
    crf: int | None,
    upscale: str | None,
    upscale_model: str | None,
    metadata: bool,
    source: Path | None,
    save_noise: Path | None,
    load_noise: Path | None,
    dtype: str | None,
    low_memory: bool | None,
    quantize: str | None,
    json_file: Path | None,
    verbose: bool,
) -> None:
    """Make a video of PROMPT.

    \b
    mlx-starflow video "waves at a beach" -m my-video-model
    mlx-starflow video "waves at a beach" -m my-video-model --frames 481 --stream -o long.mp4
    mlx-starflow video "it begins to rain" -m my-video-model --image street.jpg
    mlx-starflow video "the camera goes on" -m my-video-model --extend walk.mp4

    An empty prompt ("") gives a video of anything.
    """
    from mlx_starflow.media import noise
    from mlx_starflow.media.formats import MOVIES
    from mlx_starflow.media.outputs import STDOUT
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.media.videos import CRF, VideoWriter, check_video_output
    from mlx_starflow.sampling.bars import Bar
    from mlx_starflow.sampling.progress import Progress

    prompt = named_prompt if prompt is None else prompt
    given = {name: path for name, path in zip(SOURCES, (image, video, extend), strict=True) if path is not None}
    if crf is not None and output.suffix.lower() not in MOVIES:
        raise click.UsageError(f"--crf is about H.264, and {output} is not of it: leave it out, or name an .mp4")
    recipe: Recipe | None = None
    download = model is not None
    if source is not None:
        with ranks.together():
            recipe = _read_recipe(source, given, load_noise)
        prompt = recipe.prompts[0]
        model, adapters = chosen_networks(recipe, model, adapters, ranks)
        seed = recipe.seeds[0] if seed is None else seed
        keep_source = recipe.keep_source if keep_source is None else keep_source
        crf = recipe.crf if crf is None else crf
    keep_source = keep_source is not False
    if prompt is None:
        raise click.UsageError('there is no prompt: mlx-starflow video "waves at a beach" -m MODEL')
    if model is None:
        raise click.UsageError("give a model that makes videos: --model DIR")
    upscaler = None
    with ranks.together():
        if ranks.first:
            upscaler = chosen_upscaler(upscale, upscale_model, recipe)
            written = [output, output.with_name(f"{output.stem}-preview{output.suffix}")] if preview else [output]
            for each in written:
                check_video_output(each, stream)
            read = [path for path in (*given.values(), source, load_noise) if path is not None]
            free = claim_outputs(written if output.suffix else [], [save_noise, json_file], inputs=read)
            output, *beside = free or written

    from mlx_starflow.pipelines import VideoSettings, load_video

    if ranks.first:
        cpu.hint_if_slow()
    pipe = load_video(
        model,
        dtype=dtype,
        low_memory=low_memory,
        adapters=adapters,
        group=ranks.group,
        download=download,
        quantize=quantize,
    )
    size = pipe.format.size_of(ratio) if ratio else size
    settings = None
    if recipe:
        settings = VideoSettings.from_dict(
            {**pipe.settings.to_dict(), **recipe.settings_with(pipe.plan, pipe.backend.methods)}
        )
    if context is not None and video is None and extend is None:
        pipe.format.check_context(context)
        length = (settings or pipe.settings).frames if frames is None else frames
        if pipe.format.latent_frames(length) <= pipe.format.window:
            raise click.UsageError(
                f"--context is about what a video goes on from: leave it out, or give --extend or more --frames than "
                f"{pipe.format.trained}"
            )
    loaded = None
    if load_noise is not None:
        with ranks.together():
            loaded = noise.read_noise(load_noise)
        if recipe and recipe.noise_sha256 not in (None, noise.digest(loaded)):
            raise StarflowError(f"{load_noise} is not the noise that {source} was made from")
    ranks.agree_on_method(method or (settings or pipe.settings).method)
    ranks.agree_on_files(given)
    options = (guidance, temperature, method, attn_temp, denoise, size, frames, fps, context, kv_bits, settings)
    ranks.agree({"prompt": prompt, "options": (options, None if loaded is None else noise.digest(loaded))})
    previews = _Previews()
    progress = Progress(previews if preview and ranks.first else None, bar=None)
    made = pipe.stream(
        prompt,
        seed=seed if loaded is not None else ranks.seed(seed),
        image=image,
        video=video,
        extend=extend,
        noise=loaded,
        settings=settings,
        frames=frames,
        size=size,
        fps=fps,
        context=context,
        guidance=guidance,
        temperature=temperature,
        method=method,
        attn_temp=attn_temp,
        denoise=denoise,
        kv_bits=kv_bits,
        live=stream,
        frames_at_once=1 if stream else 16,
        previews=preview,
        verify=bool(verify),
        progress=progress,
    )
    if not ranks.first:
        for _ in made:
            pass
        return
    if save_noise is not None:
        noise.save_noise(made.noise(), save_noise)
    how = made.metadata | ({} if crf is None else {"crf": crf})
    if extend is not None and not keep_source:
        how["keep_source"] = False
    as_made = how
    shown: Iterable[Image.Image] = made
    total: int | None = made.frames
    if extend is not None and keep_source:
        shown, total = chain(_source_frames(extend, made), made), None
    width, height = made.size
    if upscaler is not None:
        # A frame that is to be watched does not wait for others.
        shown = upscaler.frames(shown, at_once=1 if stream else None)
        how, width, height = upscaler.upscaled(how), upscaler.scale * width, upscaler.scale * height
    quality = CRF if crf is None else crf
    with ExitStack() as files:
        for path in beside:
            rate, told = made.fps / pipe.vae_config.temporal_downscale, as_made | {"preview": True}
            previews.writer = files.enter_context(
                VideoWriter(path, rate, crf=quality, metadata=told if metadata else None, live=True)
            )
        writer = files.enter_context(
            VideoWriter(output, made.fps, crf=quality, metadata=how if metadata else None, live=stream)
        )
        for frame in Bar(shown, total=total, desc="frames", unit="frame", disable=None):
            writer.add(frame)
    origin = f"noise from {load_noise}" if made.seed is None else f"seed {made.seed}"
    quiet, stats = json_file == STDOUT, made.stats
    if json_file is not None:
        cost = {"seconds": stats.seconds, "memory": stats.memory, "evaluations": stats.evaluations}
        how |= {"preview": str(beside[0])} if beside else {}
        write_json({"file": str(output), "frames": writer.frames, "fps": made.fps, **how, **cost}, json_file)
    shape = f"{writer.frames} frames of {width}x{height} at {made.fps} a second"
    large = "" if upscaler is None else f", enlarged by {upscaler}"
    click.echo(f"{output}: {prompt!r}, {shape}, {origin}{large}", err=quiet)
    for path in beside:
        click.echo(f"{path}: previews, one of each latent frame", err=quiet)
    if verify:
        click.echo(f"{prompt!r}: {stats.certificate}", err=quiet)
    if verbose:
        click.echo(str(stats), err=quiet)


class _Previews:
    """A callback that writes the previews of a video."""

    writer: VideoWriter | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "preview" and self.writer is not None:
            for image in progress.preview():
                self.writer.add(image)


def _source_frames(path: Path, frames: VideoStream) -> Iterator[Image.Image]:
    from mlx_starflow.media.videos import read_video

    return read_video(path, fps=frames.fps, size=frames.size)


def _read_recipe(file: Path, given: dict[str, Path], load_noise: Path | None) -> Recipe:
    """The recipe of a video file, if all that it was made of has been given."""
    from mlx_starflow.pipelines.recipes import Recipe

    recipe = Recipe.read(file, video=True)
    for kind, name in recipe.source.items():
        if kind not in given:
            raise StarflowError(f"{file} was made from another file: give it with --{kind} {name or 'FILE'}")
    if recipe.noise_sha256 and load_noise is None:
        raise StarflowError(f"{file} was made from a noise file: give it with --load-noise")
    return recipe
