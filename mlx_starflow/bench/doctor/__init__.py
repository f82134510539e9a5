"""`mlx-starflow doctor`: what this machine really computes, line by line, each with a verdict."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_starflow import __version__
from mlx_starflow.bench.doctor import embedded, machine, operations, speed
from mlx_starflow.bench.doctor.checks import Check, Line

GROUPS: dict[str, Callable[[], list[Check]]] = {
    "machine": machine.checks,
    "operations": operations.checks,
    "embedded model": embedded.checks,
    "speed": speed.checks,
}
"""Title of each group of checks, and what gives them, in the order of the report."""


@dataclass(frozen=True)
class Report:
    """What an examination has found, group by group."""

    groups: dict[str, list[Line]]

    @property
    def lines(self) -> list[Line]:
        return [line for lines in self.groups.values() for line in lines]

    @property
    def failed(self) -> int:
        """How many lines failed."""
        return sum(line.failed for line in self.lines)

    def summary(self) -> str:
        """Their number, in one line."""
        good = sum(line.verdict == "ok" for line in self.lines)
        rest, seconds = len(self.lines) - good - self.failed, sum(line.seconds for line in self.lines)
        return f"{good} ok, {self.failed} failed, {rest} not applicable; {seconds:.0f} s"

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "mlx-starflow": __version__,
            "platform": platform.platform(),
            "failed": self.failed,
            "groups": {title: [line.to_dict() for line in lines] for title, lines in self.groups.items()},
        }


def examine(tell: Callable[[str], None] = lambda text: None) -> Report:
    """Run all checks on this machine, which takes about half a minute.

    Args:
        tell: is given the report's text, line by line as it comes to be: if a check ends the process, what stands last
            is the name of the one before it.
    """
    groups: dict[str, list[Line]] = {}
    for title, checks in GROUPS.items():
        tell(f"-- {title}")
        groups[title] = []
        for check in checks():
            groups[title].append(check.run())
            tell(str(groups[title][-1]))
    return Report(groups)
