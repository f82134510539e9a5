"""A check's line: bad things are never hidden."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mlx_starflow.bench import doctor
from mlx_starflow.bench.doctor.checks import Check, Finding, NotApplicable, within


def line(look):
    return Check("name", "at most 1", "Do this.", look).run()


def raising(error):
    def look():
        raise error

    return look


def test_good_and_bad():
    good, bad = line(lambda: Finding("0.5", values={"a": 0.5})), line(lambda: Finding("2", False))
    assert (good.verdict, bad.verdict) == ("ok", "failed")
    assert str(good).startswith("ok ") and "0.5 [at most 1]" in str(good) and "Do this." not in str(good)
    assert str(bad).startswith("FAILED") and str(bad).endswith("-> Do this.")
    assert good.to_dict()["values"] == {"a": 0.5}


def test_an_exception_is_a_failure():
    found = line(raising(RuntimeError("one\ntwo")))
    assert found.failed and "RuntimeError: one two" in str(found)
    assert line(raising(AssertionError())).failed


def test_stopping_is_not_a_failure():
    with pytest.raises(KeyboardInterrupt):
        line(raising(KeyboardInterrupt()))


def test_not_applicable_says_why_and_what_was_measured():
    found = line(raising(NotApplicable("there is no bound", "3 GB/s", {"speed": 3.0})))
    assert found.verdict == "not applicable" and not found.failed
    assert "3 GB/s; there is no bound" in str(found) and "[" not in str(found)
    assert found.to_dict()["values"] == {"speed": 3.0}


@pytest.mark.parametrize("error", [math.nan, math.inf, 2.0])
def test_what_is_not_a_number_keeps_no_bound(error):
    found = line(lambda: within({"a": 0.1, "b": error}, {"a": 1, "b": 1}))
    assert found.failed
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_report_names_no_user(monkeypatch):
    missing = FileNotFoundError(2, "No such file or directory", f"{Path.home()}/models/flow")
    found = str(line(raising(missing)))
    assert str(Path.home()) not in found
    assert "FileNotFoundError: No such file or directory: ~/models/flow (test_checks.py:" in found
    monkeypatch.setattr(Path, "home", lambda: Path("/"))  # of a container's user
    assert ": /home/someone" in str(line(raising(RuntimeError("not found: /home/someone"))))


def test_a_report(monkeypatch):
    looks = {"a": lambda: Finding("fine"), "b": raising(ValueError("no")), "c": raising(NotApplicable("not here"))}
    checks = [Check(name, "", "Do this.", look) for name, look in looks.items()]
    monkeypatch.setattr(doctor, "GROUPS", {"one": lambda: checks[:2], "two": lambda: checks[2:]})
    told = []
    report = doctor.examine(told.append)
    assert [text.split()[0] for text in told] == ["--", "ok", "FAILED", "--", "-"]
    assert report.failed == 1 and report.summary().startswith("1 ok, 1 failed, 1 not applicable")
    assert [each["name"] for each in report.to_dict()["groups"]["one"]] == ["a", "b"]


def test_every_line_says_what_to_do():
    checks = [check for group in doctor.GROUPS.values() for check in group()]
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 24
    for check in checks:
        assert check.bound and check.advice and "\n" not in check.advice
