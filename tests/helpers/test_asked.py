"""A run in another precision leaves out the tests that do not depend on it, and no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import TESTS

CONFTEST = """
import pytest
from helpers.asked import AskedPrecision
from mlx_starflow.model_dir import weights

def pytest_addoption(parser):
    parser.addoption("--dtype", default="float32")

def pytest_configure(config):
    config.pluginmanager.register(AskedPrecision(config))

@pytest.fixture(scope="session")
def loaded():
    return weights.automatic_dtype()

@pytest.fixture
def model(loaded):
    return loaded
"""

ONE = """
from mlx_starflow.model_dir import weights

def test_asks(): weights.training_dtype()
def test_does_not(): pass
def test_has_a_fixture_that_did(model): pass
def test_has_it_too(model): pass
"""

OTHER = """
import pytest
from mlx_starflow.model_dir import weights

@pytest.fixture(scope="module")
def server(): return []

def test_the_server_loads(server): server.append(weights.automatic_dtype())
def test_what_the_server_has_loaded(server): assert server

@pytest.fixture
def model(): return None

def test_has_another_fixture_of_that_name(model): pass
def test_fails(): assert False
def test_is_skipped(): pytest.skip("today")
@pytest.fixture
def after():
    yield
    weights.chip_generation()
def test_asks_at_the_end(after): pass
"""

ALL = {
    "test_asks", "test_does_not", "test_has_a_fixture_that_did", "test_has_it_too",
    "test_has_another_fixture_of_that_name", "test_fails", "test_is_skipped", "test_asks_at_the_end",
    "test_the_server_loads", "test_what_the_server_has_loaded",
}  # fmt: skip
APART = {"test_does_not", "test_has_another_fixture_of_that_name"}


@pytest.fixture
def run(tmp_path: Path):
    """Which tests of a small suite are run with these options."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    for name, text in {"conftest.py": CONFTEST, "test_one.py": ONE, "test_other.py": OTHER}.items():
        (tests / name).write_text(text)

    def run(*options: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:randomly", *options]
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            command, cwd=tmp_path, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 1, done.stdout + done.stderr  # one of them fails
        return {word.partition("::")[2] for word in done.stdout.split() if word.startswith("tests/") and "::" in word}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_leaves_out_what_does_not_ask(run, workers):
    assert run("-n", workers, "--dtype", "auto-gpu") == ALL  # nothing is known yet
    assert run("-n", workers, "--dtype", "auto-gpu") == ALL - APART
    assert run("-n", workers, "--dtype", "auto-gpu", "tests") == ALL


@pytest.mark.slow
def test_not_if_a_file_has_changed(run, tmp_path):
    assert run() == ALL
    (tmp_path / "tests/helper.py").write_text("")
    assert run("--dtype", "auto-gpu") == ALL
