"""The scripts that print what training costs run, small, and print the tables that they promise."""

from __future__ import annotations

import re

import pytest
from helpers.examples import run_example

from mlx_starflow.training.config import OPTIMIZERS


def test_optimizers(monkeypatch):
    # Compiling takes long on a CPU; the script's processes inherit this.
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    printed = run_example("reports/optimizers.py", "--steps", 2, "--channels", 64, "--batch-size", 4)
    rows = {line.split()[0]: line.split() for line in printed.splitlines()[2:]}
    assert tuple(rows) == OPTIMIZERS
    weights, state = float(rows["adamw"][1]), float(rows["adamw"][2])
    assert state == pytest.approx(2 * weights, abs=0.2) and float(rows["sinkgd"][2]) < 0.1 * weights
    assert all(float(row[3]) > weights for row in rows.values())


@pytest.mark.torch
def test_training():
    pytest.importorskip("torch")
    words = ["--channels", 64, "--batch-size", 2, "--turns", 1, "--ways", "mlx, not compiled", "pytorch"]
    output = run_example("reports/training.py", *words)
    assert re.search(r"^pytorch +\d+ +\d+ +\d+  \d+\.\d\d$", output, re.M), output
    assert "the layers' GELUs alone" in output
