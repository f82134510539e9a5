"""These tests are about the C++ network, also where the rest of the suite runs without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu.test_blas import output, packaged

WHERE = """
from mlx_starflow.cpu import library
print(library._built())
"""
COMPILER = """#!/bin/sh
while [ "$1" != "-o" ]; do shift; done
cp "{library}" "$2"
"""


@pytest.fixture(scope="module", autouse=True)
def switched_on() -> Iterator[None]:
    """Tests that switch it off say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLX_STARFLOW_KERNELS", raising=False)
        yield


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose compiler has the library ready: for tests of where it is kept, which build it often."""
    folder = tmp_path_factory.mktemp("compiler")
    built = Path(output(WHERE, packaged()).strip()).read_bytes()
    (folder / "network.so").write_bytes(built[:-32])  # without its checksum
    (folder / "g++").write_text(COMPILER.format(library=folder / "network.so"))
    (folder / "g++").chmod(0o700)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}
