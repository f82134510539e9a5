"""`mlx-starflow bench`: time the ways of sampling from a model on this machine."""

from __future__ import annotations

import json
from functools import partial

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.sampling import Size, check_reads_prompts, dtype_option


@click.command()
@click.argument("model", default="demo")
@click.option("--prompt", "prompts", multiple=True, help="What to make; give it again for more pictures at once.")
@click.option("--guidance", type=click.FloatRange(min=0), help="Its weight; the model's own by default.")
@click.option("--size", type=Size(), help="Of pictures, in pixels; the size the model was trained at by default.")
@click.option("--methods", default="sequential,jacobi,rolling,auto", show_default=True, help="What to time.")
@click.option("--repeats", type=click.IntRange(1, 10_000), default=3, show_default=True, help="Rounds after a first.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first picture's noise.")
@dtype_option("the flow")
@click.option("--against", type=click.Choice(["torch"]), help="Time PyTorch on the same weights and noise.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, in seconds and bytes.")
def bench(
    model: str,
    prompts: tuple[str, ...],
    guidance: float | None,
    size: tuple[int, int] | None,
    methods: str,
    repeats: int,
    seed: int,
    dtype: str | None,
    against: str | None,
    as_json: bool,
) -> None:
    """Time the ways of inverting MODEL's flow on this machine, in turn, on the same noise.

    For each of them: the median of all rounds; the weights that its network evaluations read for a picture, at which
    bandwidth, and which share that is of the bandwidth of these weights' matrix-vector products by themselves; how many
    times longer it takes than its own weight products alone; memory held at most; and its certificate, the distance
    between the noise and what the flow makes of the sample.
    """
    from mlx_starflow.bench.benchmark import bench as measure
    from mlx_starflow.bench.trials import PROMPTS

    check_reads_prompts(model, "--prompt", "--size")
    cpu.hint_if_slow()
    result = measure(
        model,
        prompts or PROMPTS[:1],
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        guidance=guidance,
        seed=seed,
        size=size,
        dtype=dtype,
        rounds=repeats,
        against=against,
        report=partial(click.echo, err=True),
    )
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else "\n".join(result.lines()))
