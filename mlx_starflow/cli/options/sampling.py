"""Options that the commands which make pictures or videos share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mlx_starflow.cli.options.rules import given_options
from mlx_starflow.model_dir.precision import AUTO, DTYPES, QUANTIZATIONS


def check_reads_prompts(model: str, *options: str) -> None:
    """Raise UsageError if one of these options, which are about prompts, is given, and the model reads none."""
    from mlx_starflow.model_dir.directory import ModelDirectory

    given = given_options(*options)
    if given and not ModelDirectory.find(model).reads_prompts:
        raise click.UsageError(f"{given[0]} is for models that read prompts, and {model} does not: leave it out")


class Size(click.ParamType):
    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        try:
            width, height = (int(side) for side in str(value).lower().split("x"))
            if not 1 <= min(width, height) <= max(width, height) <= 1 << 16:
                raise ValueError
        except ValueError:
            self.fail(f"{value!r} is not a size such as 64x64", param, context)
        return width, height


class Number(click.FloatRange):
    """A number in a range, which "nan" is not."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        number: float = super().convert(value, param, context)
        if number != number:
            self.fail(f"{value!r} is not in the range {self._describe_range()}.", param, context)
        return number


def with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def dtype_option(of: str) -> Callable[[Any], Any]:
    """`--dtype`, the precision of the networks or of the flow alone."""
    return click.option(
        "--dtype",
        type=click.Choice((AUTO, *DTYPES)),
        help=f"Precision of {of}; auto, the default, is what `mlx-starflow info` says of this machine.",
    )


frames_option = click.option(
    "--frames",
    type=click.IntRange(min=1),
    help="Of videos, 1 for a picture; by default as many as a model of videos was trained on.",
)

lora_option = click.option(
    "--lora",
    "adapters",
    type=(str, float),
    multiple=True,
    metavar="PATH SCALE",
    help="An adapter's folder and its strength, 1 as trained; give it again for several, which add up.",
)

sampling_options = with_options(
    click.option(
        "--guidance", type=float, help="Weight of classifier-free guidance, 0 or more; the model's own by default."
    ),
    click.option("--temperature", type=float, help="Scale of the noise; the model's own by default."),
    click.option(
        "--method",
        type=click.Choice(["auto", "sequential", "jacobi", "rolling", "draft"]),
        help="How the flow is inverted; auto follows the plan of `mlx-starflow tune`, and is rolling without one; "
        "draft begins with the guesses of --student.",
    ),
    click.option(
        "--verify/--no-verify",
        default=None,
        help="Say how far the flow, run forwards over each sample, is from its noise; or do not compute it.",
    ),
    click.option("--attn-temp", type=float, help="Divides the attention logits."),
    click.option("--denoise/--no-denoise", default=None, help="Clean the sample of the flow's training noise."),
    click.option(
        "--kv-bits",
        type=click.Choice(["auto", "none", "8", "8,4", "4"]),
        help="Keep keys and values in 8 or 4 bits, which takes half of their memory or less; 8,4: in 8, and guidance's "
        "null branch in 4; none: as computed. By default in as many as there is memory for.",
    ),
)

network_options = with_options(
    dtype_option("the networks"),
    click.option(
        "--low-memory/--no-low-memory",
        default=None,
        help="Hold one network at a time, which takes longer; by default if memory is too small for all of them.",
    ),
)

quantize_option = click.option(
    "-q",
    "--quantize",
    type=click.Choice(list(QUANTIZATIONS)),
    help="Quantize the flow as it is read: bits of a weight, or a format of `mlx-starflow quantize`.",
)

latent_batch_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    help="Pictures, or latent frames, at once.",
)
