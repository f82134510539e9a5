"""The script that measures what tuning takes."""

from __future__ import annotations

from helpers.examples import run_example
from helpers.paths import DATA


def test_tuning() -> None:
    printed = run_example("reports/tuning.py", "demo", DATA / "latent_flow", "--samples", 1)
    assert printed.count("| seconds | by CRM |") == printed.count("| evaluations | widest first |") == 2
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| evaluations | ")]
    spent = {(number // 4, row[2].strip()): int(row[3]) for number, row in enumerate(rows)}
    # The trained flow of 256 tokens: the wide windows, which come first, need the fewest evaluations.
    assert spent[1, "widest first"] < 0.5 * spent[1, "narrowest first"]
