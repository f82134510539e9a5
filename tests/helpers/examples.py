"""Running the scripts of examples/, and their functions."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType

from helpers.paths import EXAMPLES


def run_example(name: str, *words: object) -> str:
    """What `examples/<name>` prints when it is run with these arguments."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
