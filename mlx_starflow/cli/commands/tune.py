"""`mlx-starflow tune`: find the fastest way to sample from a model on this machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.outputs import claim_outputs, overwrite_option
from mlx_starflow.cli.options.sampling import Size, check_reads_prompts, dtype_option, frames_option
from mlx_starflow.cli.options.text import Lines
from mlx_starflow.cli.options.vocabulary import json_option, model_argument


@click.command()
@model_argument()
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True, max=100),
    default=1e-2,
    help="Largest |f(x) - z| a sample may have, in standard deviations of the noise.",
)
@click.option(
    "--least",
    type=click.Choice(["seconds", "evaluations"]),
    default="seconds",
    help="What the plan keeps small: time on this machine, or network evaluations, for one that waits for weights.",
)
@click.option("--guidance", type=click.FloatRange(min=0), help="What to tune for; the model's own by default.")
@click.option("--size", type=Size(), help="In pixels; the size the model was trained at by default.")
@frames_option
@click.option(
    "--prompt-file", type=Lines(), help="Prompts to try, one a line; four simple ones by default, one for videos."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the first prompt's noise.")
@dtype_option("the flow")
@click.option(
    "--kv-bits",
    type=click.Choice(["none", "8", "8,4", "4"]),
    default="none",
    help="Tune for keys and values in so many bits; the plan is used with these alone.",
)
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Try the guesses of this student (see distill) too; --method draft then follows the plan.",
)
@json_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Only say what would be chosen.")
def tune(
    model: str,
    tolerance: float,
    least: str,
    guidance: float | None,
    size: tuple[int, int] | None,
    frames: int | None,
    prompt_file: list[str] | None,
    seed: int,
    dtype: str | None,
    kv_bits: str,
    student: Path | None,
    json_file: Path | None,
    dry_run: bool,
) -> None:
    """Measure on a few prompts how fast each block of MODEL's flow can be inverted, and write a sampling plan.

    The plan, sampling_plan.json in the model's directory, is what --method auto follows, which is the default. Its
    samples are those of sequential sampling up to the tolerance: run the flow over them, and the noise they were made
    of comes back with at most this difference. A model of videos is tuned on videos: how to make the first frame, and
    how the later ones, which have frames before them.
    """
    from mlx_starflow.bench.trials import prepare
    from mlx_starflow.media.outputs import STDOUT
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.model_dir.directory import ModelDirectory, load_student
    from mlx_starflow.model_dir.fingerprint import fingerprint
    from mlx_starflow.model_dir.hub import find_model
    from mlx_starflow.model_dir.transaction import locked
    from mlx_starflow.model_dir.weights import parse_dtype
    from mlx_starflow.sampling.cache import KV_CHOICES
    from mlx_starflow.sampling.tuning import tune as find_plan

    claim_outputs([], [json_file])
    check_reads_prompts(model, "--prompt-file", "--size", "--frames")
    if not dry_run:
        # From the start, so that no measurement is lost to another writer.
        click.get_current_context().with_resource(locked(find_model(model)))
    cpu.hint_if_slow()
    trials = prepare(
        model, prompt_file, guidance=guidance, seed=seed, dtype=parse_dtype(dtype), size=size, frames=frames
    )
    task = trials.task
    plan = find_plan(
        task.flow,
        task.z,
        task.text,
        task.null_text,
        task.guidance,
        tolerance=tolerance,
        least=least,
        kv_bits=KV_CHOICES[kv_bits] or 0,
        student=None if student is None else load_student(student, ModelDirectory(trials.directory)),
        report=partial(click.echo, err=json_file == STDOUT),
        progress=None,
    )
    plan = replace(plan, fingerprint=fingerprint(trials.directory))
    if not dry_run:
        click.echo(f"{plan.save(trials.directory)} is written", err=json_file == STDOUT)
    if json_file is not None:
        write_json({"model": model, "seed": seed, **plan.to_dict()}, json_file)
