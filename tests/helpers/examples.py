"""Running the scripts of examples/, and their functions."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from types import ModuleType

from helpers.paths import EXAMPLES


def run_example(name: str, *words: object) -> str:
    """What `examples/<name>` prints when it is run with these arguments, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_example_here(name: str, *words: object) -> str:
    """What `examples/<name>` prints when it is run with these arguments, in this process.

    For scripts that only call the package: MLX, and what has been compiled, need not be loaded again.
    """
    path, printed, before = EXAMPLES / name, StringIO(), (sys.argv, sys.path)
    sys.argv, sys.path = [str(path), *map(str, words)], [str(path.parent), *sys.path]
    try:
        with redirect_stdout(printed):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path = before
    return printed.getvalue()


def example_module(name: str) -> ModuleType:
    """`examples/<name>` as a module, to call its functions; it may import its neighbours, as when it is run."""
    path = EXAMPLES / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
