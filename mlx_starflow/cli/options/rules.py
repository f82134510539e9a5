"""Which options go together: a command says so in a table, and what would be ignored is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import click
from click.core import ParameterSource

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rule:
    """What one option wants of others.

    Attributes:
        option: its long name, or an argument's in capitals. With a value, such as "--views 1", it means that one,
            whether the user has said it or nobody.
        others: the same of others.
        needed: whether one of these must be there, or none.
        reason: the error message; by default one that names both.
    """

    option: str
    others: tuple[str, ...]
    needed: bool
    reason: str = ""

    def broken(self, context: click.Context) -> str:
        """The error message if a command line breaks the rule; "" if it does not."""
        if not _is_given(context, self.option):
            return ""
        if self.needed:
            if any(_is_on(context, other) for other in self.others):
                return ""
            there = " or ".join(self.others)
            return self.reason or f"{self.option} does nothing alone: give {there} too, or leave it out"
        other = next((other for other in self.others if _is_given(context, other)), "")
        if not other:
            return ""
        return self.reason or f"{self.option} and {other} do not go together: leave one of them out"


def needs(option: str, *others: str, reason: str = "") -> Rule:
    """`option` does nothing unless one of the others is there."""
    return Rule(option, others, True, reason)


def excludes(option: str, *others: str, reason: str = "") -> Rule:
    """`option` would have to be ignored, or any of the others, where both are there."""
    return Rule(option, others, False, reason)


def option_rules(
    *rules: Rule,
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Below the options of a command: refuse command lines that break one of these rules, before any work."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def checked(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
            context = click.get_current_context()
            for rule in rules:
                if message := rule.broken(context):
                    raise click.UsageError(message)
            return function(*arguments, **options)

        checked.__dict__["rules"] = rules
        return checked

    return decorate


def given_options(*names: str) -> list[str]:
    """Those of these options that the user of the current command has given; for what only the work itself shows."""
    context = click.get_current_context()
    return [name for name in names if _is_given(context, name)]


def given_besides(*names: str) -> list[str]:
    """What else the user of the current command has given: the names of parameters other than these."""
    command = click.get_current_context().command
    taken = {id(find_parameter(command, name)) for name in names}
    others = [parameter for parameter in command.params if id(parameter) not in taken]
    return given_options(*(spelling for other in others for spelling in _spellings(other)))


def _spellings(parameter: click.Parameter) -> list[str]:
    """What a user calls a parameter: both names of a switch that has two."""
    if isinstance(parameter, click.Argument):
        return [str(parameter.name).upper()]
    return [max(names, key=len) for names in (parameter.opts, parameter.secondary_opts) if names]


def find_parameter(command: click.Command, name: str) -> click.Parameter:
    """The parameter that a rule calls so; raises KeyError if a command has none."""
    name = name.split(" ")[0]
    for parameter in command.params:
        spellings = [*parameter.opts, *parameter.secondary_opts]
        if isinstance(parameter, click.Argument):
            spellings = [str(parameter.name).upper()]
        if name in spellings:
            return parameter
    raise KeyError(name)


def _is_given(context: click.Context, name: str) -> bool:
    """Whether the user has said this on the command line.

    What a file of `--config` says does not count: this program writes such files, with all options of a run.
    """
    parameter = find_parameter(context.command, name)
    if " " in name:
        return _is_on(context, name)
    source = context.get_parameter_source(parameter.name or "")
    value = context.params.get(parameter.name or "")
    if source not in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT) or value in (None, (), []):
        return False
    # Of two names, such as --check and --no-check, the one that was said.
    if isinstance(parameter, click.Option) and parameter.secondary_opts:
        return value == (name in parameter.opts)
    return True


def _is_on(context: click.Context, name: str) -> bool:
    """Whether an option has this value, or any that is not none at all, whoever says so."""
    parameter = find_parameter(context.command, name)
    value = context.params.get(parameter.name or "")
    _, _, wanted = name.partition(" ")
    return str(value) == wanted if wanted else bool(value)
