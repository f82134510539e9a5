"""Options that mean the same in every command: the prompt, the model, seeds, JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click

from mlx_starflow.cli.options.outputs import OUTPUT

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Renamed(click.Option):
    """An option that had other names, which are understood and not shown.

    Args:
        old: the names, such as ("--from",).
    """

    def __init__(self, *arguments: Any, old: tuple[str, ...], **options: Any):
        super().__init__(*arguments, **options)
        self.old = old

    def add_to_parser(self, parser: Any, context: click.Context) -> None:
        super().add_to_parser(parser, context)
        parser.add_option(obj=self, opts=self.old, dest=self.name, action="store", nargs=self.nargs)


def model_argument(
    default: str | None = "demo", metavar: str = "MODEL"
) -> Callable[[Callable[Arguments, Result]], Callable[..., Result]]:
    """The argument MODEL, which may be given as `-m` too; the command gets one `model`."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[..., Result]:
        @click.argument("model", required=False, metavar=f"[{metavar}]")
        @click.option(
            "-m",
            "--model",
            "named_model",
            metavar=metavar,
            help=f"The same as {metavar}." + (f"  [default: {default}]" if default else ""),
        )
        @wraps(function)
        def command(model: str | None, named_model: str | None, **options: Any) -> Result:
            if model is not None and named_model is not None:
                raise click.UsageError(f"{metavar} and --model are the same: leave one of them out")
            chosen = named_model if model is None else model
            if chosen is None and default is None:
                raise click.UsageError(f"there is no model: give {metavar}, or --model")
            return function(model=default if chosen is None else chosen, **options)  # type: ignore[call-arg,arg-type]

        return command

    return decorate


json_option = click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write JSON; - prints it.")

optional_json_option = click.option(
    "--json",
    "json_file",
    type=OUTPUT,
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write JSON; - prints it, as --json alone does at the end of the line.",
)
"""For commands where `--json` had no value."""

drawn_seed_option = click.option(
    "--seed", type=click.IntRange(min=0), help="Of the first one; drawn and reported if left out."
)

quality_option = click.option(
    "--quality", type=click.IntRange(1, 100), help="Of JPEG and WebP files, 100 the best.  [default: 95]"
)
