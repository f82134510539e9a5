"""Seconds and memory of enlarging: the report's table has a line for each network and size of tiles."""

from __future__ import annotations

import re

import pytest
from helpers.examples import run_example


@pytest.mark.parametrize("only", ["span", "animevideov3"])
def test_each_size_of_tiles_has_a_line(only):
    printed = run_example("reports/upscaling.py", "--only", only, "--size", 24, "--tiles", 24, 16)
    lines = [line for line in printed.splitlines() if only in line]
    assert [re.split(r" *\| *", line)[3] for line in lines] == ["24", "16"]
    assert "estimate for M1, M3 Max 40-core" in printed
