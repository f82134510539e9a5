"""`mlx-starflow distill`: a student that makes in a few evaluations what a model's flow samples."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.config_file import config_option, save_options
from mlx_starflow.cli.options.interrupt import resumable
from mlx_starflow.cli.options.outputs import OUTPUT
from mlx_starflow.cli.options.rules import excludes, given_options, needs, option_rules
from mlx_starflow.cli.options.sampling import lora_option
from mlx_starflow.cli.options.text import Lines
from mlx_starflow.cli.options.training import SHARE, training_options
from mlx_starflow.cli.options.vocabulary import model_argument
from mlx_starflow.training.config import TrainingOptions

NOT_OF_STUDENTS = (
    "--noise-std", "--level-sampling", "--level-weight", "--caption-dropout", "--context-full", "--context-partial",
    "--shard",
)  # fmt: skip
"""Options that are about flows."""


@click.command()
@model_argument(default=None, then="data", needs_then=False)
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=OUTPUT, required=True, help="Folder to write: pairs, checkpoints and the student.")
@config_option
@click.option(
    "--kind",
    type=click.Choice(["inverse", "matching"]),
    default="inverse",
    show_default=True,
    help="inverse: noise to picture at once; matching: a velocity, for 1 to 16 steps.",
)
@click.option("--pairs", type=click.IntRange(min=2), default=8192, show_default=True, help="Of noise and data.")
@click.option("--guidance", type=click.FloatRange(min=0), help="Of the samples that the pairs are; the model's own.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Of the samples' noise; the model's own.")
@click.option("--prompt-file", type=Lines(), help="Prompts of the samples, one a line.")
@click.option("--channels", type=click.IntRange(min=1), help="Width of the student; the flow's by default.")
@click.option("--layers", type=click.IntRange(min=1), help="Of the student; half of the flow's by default.")
@click.option("--independent", is_flag=True, help="Learn from fresh noise, not from pairs: to compare with.")
@click.option("--transport", type=click.FloatRange(min=0), default=0.0, help="Prefer pairs that are this near; 0: all.")
@lora_option
@click.option(
    "--from",
    "base",
    type=click.Path(path_type=Path),
    metavar="STUDENT",
    help="Teach this student what --lora does to MODEL: an adapter of it, OUT/adapter, is all that is trained.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Of that adapter.  [default: 16]")
@click.option("--validation", type=SHARE, default=0.05, show_default=True, help="Share of the pairs that is held out.")
@training_options
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run stopped.")
@click.option("--dry-run", is_flag=True, help="Say how large it is and how long its training takes; write nothing.")
@option_rules(
    needs("--independent", "--kind matching"),
    needs("--transport", "--kind matching"),
    needs("--lora", "--from"),
    needs("--from", "--lora"),
    needs("--rank", "--from"),
    *(excludes("--from", name) for name in ("--kind", "--channels", "--layers")),
)
@click.pass_context
def distill(
    context: click.Context,
    model: str,
    data: Path | None,
    output: Path,
    kind: str,
    pairs: int,
    guidance: float | None,
    temperature: float | None,
    prompt_file: list[str] | None,
    channels: int | None,
    layers: int | None,
    independent: bool,
    transport: float,
    adapters: tuple[tuple[str, float], ...],
    base: Path | None,
    rank: int | None,
    validation: float,
    training: TrainingOptions,
    resume: bool,
    dry_run: bool,
) -> None:
    """Train a student of MODEL's flow: a network that makes of noise, in a few evaluations, about what the flow makes.

    Pairs of noise and data come first. DATA, captioned pictures or a cache of them, gives exact pairs in one pass a
    picture, without guidance. With --guidance, or without DATA, the pairs are the model's own samples; the prompts are
    DATA's captions or those of --prompt-file, and a TarFlow's are its classes.

    \b
    mlx-starflow distill my-model pictures -o student
    mlx-starflow distill my-model pictures -o student --guidance 1.5 --pairs 20000
    mlx-starflow distill my-model --prompt-file prompts.txt -o student --kind matching
    mlx-starflow generate "a red cube" --model my-model --student student

    With --lora and --from a student learns the style of an adapter of MODEL, as an adapter of its own.

    \b
    mlx-starflow distill my-model --lora run/adapter 1 --from student --prompt-file prompts.txt -o style
    mlx-starflow generate "a red cube" --model my-model --student student --lora style/adapter 1

    Ctrl-C saves; the same command resumes.
    """
    from mlx_starflow.training.recipes.student import NewStudent

    if given := given_options(*NOT_OF_STUDENTS):
        raise click.UsageError(f"{given[0]} is for flows, and a student is none: leave it out")
    cpu.hint_if_slow()
    run = NewStudent(
        model,
        output,
        data,
        kind=kind,
        pairs=pairs,
        guidance=guidance,
        temperature=temperature,
        prompts=prompt_file or (),
        channels=channels,
        layers=layers,
        independent=independent,
        transport=transport,
        base=base,
        adapters=adapters,
        rank=rank,
        training=training,
        validation=validation,
        report=click.echo,
    )
    if dry_run:
        click.echo(run.step_time())
        return

    def begin() -> None:
        settings = {name: value for name, value in asdict(run.training_config()).items() if name in context.params}
        save_options(context, output / "training/config.yaml", settings)

    with resumable():
        run.run(resume, begin)
