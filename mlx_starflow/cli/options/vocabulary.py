"""Options that mean the same in every command: the prompt, the model, seeds, JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click
from click.core import ParameterSource

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
    default: str | None = "demo", metavar: str = "MODEL", then: str | None = None, needs_then: bool = True
) -> Callable[[Callable[Arguments, Result]], Callable[..., Result]]:
    """The argument MODEL, which may be given as `-m` too; the command gets one `model`.

    Args:
        default: of it; None: it has to be given.
        metavar: what help calls it.
        then: name of the command's argument that comes after it, which is the first one where `-m` is given. It is
            declared with `required=False`, and the command gets no None.
        needs_then: False: it may be left out, and is None then.
    """

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
            if then is not None:
                model = _shift(model, named_model, then, options, needs_then)
            if model is not None and named_model is not None:
                raise click.UsageError(f"{metavar} and --model are the same: leave one of them out")
            chosen = named_model if model is None else model
            if chosen is None and default is None:
                raise click.UsageError(f"there is no model: give {metavar}, or --model")
            return function(model=default if chosen is None else chosen, **options)  # type: ignore[call-arg,arg-type]

        return command

    return decorate


def _shift(
    model: str | None, named_model: str | None, then: str, options: dict[str, Any], needs_then: bool
) -> str | None:
    """What of MODEL and the argument after it is which, where the model may have been named by `-m`.

    `options` gets the argument. Raises UsageError if it is missing and needed.
    """
    context = click.get_current_context()
    words = ParameterSource.COMMANDLINE
    if named_model is not None and context.get_parameter_source("model") is not words:
        model = None  # a file of --config has it too
    elif named_model is not None and context.get_parameter_source(then) is not words:
        parameter = next(each for each in context.command.params if each.name == then)
        options[then], model = parameter.type_cast_value(context, model), None
    if options[then] is None and needs_then:
        raise click.UsageError(f"Missing argument '{then.upper()}'.")
    return model


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
