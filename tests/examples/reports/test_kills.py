"""`examples/reports/kills.py`: writers that are killed and pairs of them leave the old model or the new one."""

from __future__ import annotations

from helpers.examples import run_example


def test_a_few_kills_and_a_pair():
    lines = run_example("reports/kills.py", "quantize", "--most", 12, "--pairs", 2).splitlines()
    names = ("kills", "old", "new", "mixed", "not written again", "pairs", "one of both", "refused")
    assert len(lines) == 3, lines
    found = dict(zip(names, map(int, lines[-1].split()[1:]), strict=True))
    assert found["kills"] == 12 == found["old"] + found["new"]
    assert found["old"] and found["new"]
    assert not found["mixed"] and not found["not written again"]
    assert found["pairs"] == 2 == found["one of both"]
