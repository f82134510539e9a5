"""The script that measures plans for videos, with a flow that has learned next to nothing."""

from __future__ import annotations

import re

import pytest
from helpers.examples import run_example

from mlx_starflow.sampling.methods import FRAME_GUESSES

pytestmark = pytest.mark.reports


def test_video_plans(tmp_path):
    run_example("reports/moving_shapes.py", tmp_path, "--steps", 2, "--batch-size", 2, "--channels", 32)
    words = ["--videos", 1, "--temperatures", 0.5, "--tolerances", 1e-2, "--rounds", 1]
    printed = run_example("reports/video_plans.py", tmp_path, *words)
    for guess in ("noise", "affine", *FRAME_GUESSES):
        assert f"| {guess} |" in printed
    # What is printed as the ratio is that of the evaluations above it.
    for part in printed.split("### Certificate ")[1:]:
        tolerance = part.split()[0].rstrip(",")
        for how, table in zip(("whole", "stream"), part.split("| ms |")[1:], strict=True):
            rows = re.findall(r"\| ([a-z ]+) \| [\d. +]+ = ([\d.]+) \|", table)
            total = {name: float(value) for name, value in rows}
            # A token of 64 in the deep block, and in two others one for all 8 frames together, or for each.
            assert total["sequential"] == (80.0 if how == "whole" else 192.0)
            line = rf"\| {re.escape(tolerance)} \| {how} \| official blocks of videos \| ([\d.]+) \|"
            (ratio,) = re.findall(line, printed)
            ours, theirs = total["plan of fewest evaluations"], total["official blocks of videos"]
            assert float(ratio) == pytest.approx(ours / theirs, abs=0.05)
