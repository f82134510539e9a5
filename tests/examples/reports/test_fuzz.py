"""Mutated files of every kind, and the C++ network under AddressSanitizer: a small part of what the scripts do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.examples import run_example

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory")


@pytest.mark.slow
def test_no_reader_fails_otherwise_than_by_a_starflow_error():
    output = run_example("reports/fuzz.py", "--mutations", 300)
    name, read, refused, *faults = output.splitlines()[-1].split()
    assert name == "all" and int(read) + int(refused) == 300 and faults == ["0", "0", "0"]
    assert int(refused) > 100  # the mutations are felt


@pytest.mark.slow
def test_the_network_touches_no_foreign_memory(monkeypatch):
    monkeypatch.delenv("MLX_STARFLOW_KERNELS", raising=False)
    found = shutil.which("g++") and subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True
    )
    if not found or not Path(found.stdout.strip()).is_file():
        pytest.skip("there is no g++ with AddressSanitizer")
    output = run_example("reports/fuzz_native.py", "--configs", 12)
    assert "12 configurations: 0 reports of AddressSanitizer" in output
