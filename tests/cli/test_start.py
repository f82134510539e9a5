"""What the command loads before it does anything."""

from __future__ import annotations

import subprocess
import sys

import click

from mlx_starflow.cli import main

HEAVY = {"mlx", "mlx.core", "numpy", "PIL", "yaml", "tqdm", "safetensors", "huggingface_hub", "torch"}


def test_help_of_all_commands_loads_no_heavy_package():
    command = [sys.executable, "-X", "importtime", "-m", "mlx_starflow", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # It shows a summary of each command, for which it imports them all.
    assert {f"  {name} " in done.stdout for name in main.list_commands(click.Context(main))} == {True}
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported and not imported & HEAVY
