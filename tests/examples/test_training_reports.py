"""The scripts that print what training costs run, small, and print the tables that they promise."""

from __future__ import annotations

import re

import pytest
from helpers.paths import EXAMPLES

from mlx_starflow.training.config import OPTIMIZERS


def test_optimizer_report(capsys, monkeypatch):
    # Compiling takes long on a CPU; the script's processes inherit this.
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import optimizer_report

    optimizer_report.main(["--steps", "2", "--channels", "64", "--batch-size", "4"])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert tuple(rows) == OPTIMIZERS
    weights, state = float(rows["adamw"][1]), float(rows["adamw"][2])
    assert state == pytest.approx(2 * weights, abs=0.2) and float(rows["sinkgd"][2]) < 0.1 * weights
    assert all(float(row[3]) > weights for row in rows.values())


@pytest.mark.torch
def test_training_report(capsys, monkeypatch):
    pytest.importorskip("torch")
    words = ["--channels", "64", "--batch-size", "2", "--turns", "1", "--ways", "mlx, not compiled", "pytorch"]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import training_report

    training_report.main(words)
    output = capsys.readouterr().out
    assert re.search(r"^pytorch +\d+ +\d+ +\d+  \d+\.\d\d$", output, re.M), output
    assert "the layers' GELUs alone" in output
