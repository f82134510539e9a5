"""`mlx-starflow bench`: time the ways of sampling from a model on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.outputs import claim_outputs, overwrite_option
from mlx_starflow.cli.options.sampling import Size, check_reads_prompts, dtype_option, frames_option
from mlx_starflow.cli.options.vocabulary import model_argument, optional_json_option


@click.command()
@model_argument()
@click.option("-p", "--prompt", "prompts", multiple=True, help="What to make; give it again for more pictures at once.")
@click.option("--guidance", type=click.FloatRange(min=0), help="Its weight; the model's own by default.")
@click.option("--size", type=Size(), help="Of pictures, in pixels; the size the model was trained at by default.")
@frames_option
@click.option("--methods", default="sequential,jacobi,rolling,auto", help="What to time.")
@click.option("--repeats", type=click.IntRange(1, 10_000), default=3, help="Rounds after a first.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the first picture's noise.")
@dtype_option("the flow")
@click.option("--against", type=click.Choice(["torch"]), help="Time PyTorch on the same weights and noise.")
@optional_json_option
@overwrite_option
def bench(
    model: str,
    prompts: tuple[str, ...],
    guidance: float | None,
    size: tuple[int, int] | None,
    frames: int | None,
    methods: str,
    repeats: int,
    seed: int,
    dtype: str | None,
    against: str | None,
    json_file: Path | None,
) -> None:
    """Time the ways of inverting MODEL's flow on this machine, in turn, on the same noise.

    For each of them: the median of all rounds; the weights that its network evaluations read for a picture, at which
    bandwidth, and which share that is of the bandwidth of these weights' matrix-vector products by themselves; how many
    times longer it takes than its own weight products alone; memory held at most; and its certificate, the distance
    between the noise and what the flow makes of the sample. A model of videos makes videos, and evaluations and seconds
    are given for a latent frame too.
    """
    from mlx_starflow.bench.benchmark import bench as measure
    from mlx_starflow.bench.trials import PROMPTS
    from mlx_starflow.media.outputs import STDOUT
    from mlx_starflow.media.tables import write_json

    claim_outputs([], [json_file])
    check_reads_prompts(model, "--prompt", "--size", "--frames")
    cpu.hint_if_slow()
    result = measure(
        model,
        prompts or PROMPTS[:1],
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        guidance=guidance,
        seed=seed,
        size=size,
        frames=frames,
        dtype=dtype,
        rounds=repeats,
        against=against,
        report=partial(click.echo, err=True),
    )
    if json_file is not None:
        write_json(result.to_dict(), json_file)
    if json_file != STDOUT:
        click.echo("\n".join(result.lines()))
