"""`mlx-starflow doctor` on this machine, and what it does about bad news."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from helpers.commands import Command

from mlx_starflow.bench import doctor as examination
from mlx_starflow.bench.doctor.checks import Check, Finding, NotApplicable

doctor = Command("doctor")


@pytest.fixture
def short(monkeypatch):
    """Three checks; the second can be made to fail."""
    finding = [Finding("1 ms")]

    def absent():
        raise NotApplicable("there is none")

    looks = {"first": lambda: Finding("fine"), "second": lambda: finding[0], "third": absent}
    checks = [Check(name, "any", "Do this.", look) for name, look in looks.items()]
    monkeypatch.setattr(examination, "GROUPS", {"group": lambda: checks})
    return finding


@pytest.mark.slow
@pytest.mark.usefixtures("chosen_here")
def test_this_machine(tmp_path):
    """Exit code 0, and every line that applies here verified."""
    result = doctor("--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    lines = {line["name"]: line for lines in report["groups"].values() for line in lines}
    absent = {name for name, line in lines.items() if line["verdict"] == "not applicable"}
    assert all(line["verdict"] == "ok" for name, line in lines.items() if name not in absent)
    if mx.default_device() == mx.cpu:
        kernels = {name for name in lines if name.startswith("kernel ")}
        assert absent <= {"GPU", "BLAS", "C++ network", "memory bandwidth", *kernels} and {"GPU", *kernels} <= absent
    assert all(name in result.stdout for name in lines)


def test_what_it_prints(short):
    result = doctor()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("mlx-starflow doctor")
    assert [line.split()[:2] for line in lines[3:6]] == [["ok", "first"], ["ok", "second"], ["-", "third"]]
    assert lines[-1].startswith("2 ok, 0 failed, 1 not applicable")


def test_a_failure(short, tmp_path):
    short[0] = Finding("9 ms", False)
    result = doctor("--json", tmp_path / "report.json")
    assert result.exit_code == 1
    assert "FAILED  second" in result.stdout and "-> Do this." in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["failed"] == 1


def test_json_alone(short):
    result = doctor("--json", "-")
    assert result.exit_code == 0
    assert [line["verdict"] for line in json.loads(result.stdout)["groups"]["group"]] == ["ok", "ok", "not applicable"]
    assert "first" in result.stderr


def test_mistakes(short, tmp_path):
    assert "cannot be written" in doctor.mistake("--json", tmp_path)
    assert "cannot be written" in doctor.mistake("--json", tmp_path / "missing" / "report.json")
