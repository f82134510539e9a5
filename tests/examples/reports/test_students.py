"""The script that compares students with their teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.examples import run_example
from helpers.model_directories import write_image_model
from helpers.scenes import write_sprites
from helpers.students import write_student


def test_students(tmp_path: Path) -> None:
    model = write_image_model(tmp_path / "model")
    inverse = write_student(tmp_path / "inverse", model, guidance=1.0)
    matching = write_student(tmp_path / "matching", model, "matching", guidance=1.0)
    independent = write_student(tmp_path / "independent", model, "matching", guidance=1.0, num_layers=2)
    students = ("--inverse", inverse, "--matching", matching, "--independent", independent)
    options = (*students, "--scenes", write_sprites(tmp_path), "--samples", 3)
    printed = run_example("reports/students.py", model, *options)
    rows = {row[1].strip(): row for line in printed.splitlines() if len(row := line.split("|")) == 9}
    assert float(rows["teacher, sequential"][3]) == 32
    for name in ("teacher, sequential", "teacher, auto", "teacher, draft"):
        assert float(rows[name][4].split()[0]) < 2e-2 and float(rows[name][5]) < 1e-2
    assert float(rows["teacher, other noise"][4].split()[0]) > 0.1
    assert float(rows["inverse student, 4"][3]) == 4 and float(rows["matching student, 16"][3]) == 16
    nearer = float(rows["independent student, 1"][4].split()[0]) - float(rows["matching student, 1"][4].split()[0])
    (said,) = (line for line in printed.splitlines() if line.startswith("1: pairs are nearer by "))
    assert float(said.split()[5]) == pytest.approx(nearer, abs=1e-3)
    errors = {row[1].strip(): float(row[2]) for line in printed.splitlines() if len(row := line.split("|")) == 4
              and row[1].strip()[:1].isdigit()}  # fmt: skip
    assert errors["0.01"] < errors["1"] < 32
