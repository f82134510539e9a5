"""What a check is: something to look at, a bound that it must keep, and what to do if it does not."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from mlx_starflow.errors import one_line

Verdict = Literal["ok", "failed", "not applicable"]


class NotApplicable(Exception):
    """This machine has nothing to check here; the message says why. What was measured all the same may be given."""

    def __init__(self, reason: str, measured: str = "", values: Mapping[str, float] | None = None):
        super().__init__(reason)
        self.measured, self.values = measured, dict(values or {})


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        measured: in words.
        good: whether it keeps the bound.
        values: its numbers by name, for machines that read the report.
    """

    measured: str
    good: bool = True
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One line of the report, before it is written.

    Attributes:
        name: what is checked.
        bound: what a good finding keeps, in words.
        advice: what to do if it does not, in one sentence.
        look: finds out. It may raise `NotApplicable`; any other exception is a failure.
    """

    name: str
    bound: str
    advice: str
    look: Callable[[], Finding]

    def run(self) -> Line:
        start = perf_counter()
        verdict: Verdict
        values: Mapping[str, float]
        try:
            finding = self.look()
            verdict, measured, values = "ok" if finding.good else "failed", finding.measured, finding.values
        except NotApplicable as reason:
            verdict, values = "not applicable", reason.values
            measured = f"{reason.measured}; {reason}" if reason.measured else str(reason)
        except Exception as error:
            verdict, measured, values = "failed", _accident(error), {}
        return Line(self.name, verdict, measured, self.bound, self.advice, values, perf_counter() - start)


@dataclass(frozen=True)
class Line:
    """One line of the report: a `Check` and what came of it, with the seconds that it took."""

    name: str
    verdict: Verdict
    measured: str
    bound: str
    advice: str
    values: Mapping[str, float]
    seconds: float

    @property
    def failed(self) -> bool:
        return self.verdict == "failed"

    def __str__(self) -> str:
        mark = {"ok": "ok", "failed": "FAILED", "not applicable": "-"}[self.verdict]
        bound = f" [{self.bound}]" if self.bound and self.verdict != "not applicable" else ""
        advice = f"\n{'':<8}-> {self.advice}" if self.failed else ""
        return f"{mark:<7} {self.name:<24} {self.measured}{bound}{advice}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinities."""
        values = {name: value if math.isfinite(value) else str(value) for name, value in self.values.items()}
        return {
            "name": self.name,
            "verdict": self.verdict,
            "measured": self.measured,
            "bound": self.bound,
            "advice": self.advice,
            "values": values,
            "seconds": round(self.seconds, 3),
        }


def _accident(error: Exception) -> str:
    """What an exception says, and where it was raised, without the name of the user's folder."""
    file = getattr(error, "filename", None)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    words = f"{one_line(error)}: {file}" if file else one_line(error)
    home = str(Path.home())
    words = words.replace(home, "~") if len(home) > 1 else words
    return f"{type(error).__name__}: {words[:300]}{place}"


def within(errors: Mapping[str, float], bounds: Mapping[str, float], form: str = ".1e") -> Finding:
    """A finding of several errors, each with a bound of its own; one that is not a number keeps none."""
    return Finding(
        ", ".join(f"{name} {error:{form}}" for name, error in errors.items()),
        all(error <= bounds[name] for name, error in errors.items()),
        errors,
    )


def at_most(bounds: Mapping[str, float]) -> str:
    """The bound of `within`, in words."""
    return "at most " + ", ".join(f"{bound:g} ({name})" for name, bound in bounds.items())
