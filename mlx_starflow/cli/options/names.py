"""Names of outputs with fields in them: `-o "{prompt}-{seed}.png"`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

FIELDS = ("prompt", "seed", "index")

LONGEST = 80
"""Characters of a prompt in a name."""

_FIELD = re.compile(r"\{(\w*)\}")

HELP = "{prompt}, {seed} and {index} in its name make a file for each picture."


def fields(output: Path) -> set[str]:
    """The fields in the name of an output. Raises UsageError for one that there is not."""
    if _FIELD.search(str(output.parent)):
        raise click.UsageError(f"{output}: fields such as {{seed}} stand in the file's name, not in its folder's")
    found = set(_FIELD.findall(output.name))
    for name in found.difference(FIELDS):
        known = ", ".join(f"{{{each}}}" for each in FIELDS)
        raise click.UsageError(f"{output}: there is no field {{{name}}}; names know {known}")
    return found


def filled(output: Path, requests: Sequence[tuple[str, int | None]]) -> list[Path]:
    """The names of so many images, each of a prompt and a seed.

    Raises:
        UsageError: two of them would have the same name, or {seed} stands there and noise was given instead.
    """
    names = fields(output)
    if "seed" in names and any(seed is None for _, seed in requests):
        raise click.UsageError(f"{output}: with --load-noise pictures have no seed; use {{index}}")
    made = []
    for index, (prompt, seed) in enumerate(requests, 1):
        values = {"prompt": _slug(prompt), "seed": str(seed), "index": f"{index:0{len(str(len(requests)))}}"}
        name = output.name
        for field, value in values.items():
            name = name.replace(f"{{{field}}}", value)
        made.append(output.with_name(name))
    if len(set(made)) < len(made):
        raise click.UsageError(f"{output}: several pictures would have the same name; add {{index}}")
    return made


def _slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower())[:LONGEST].strip("-_") or "anything"
