"""The speed report runs, and its tables hold what it promises. Times are not looked at."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

pytestmark = pytest.mark.torch

SCRIPT = Path(__file__).parents[2] / "examples/speed_report.py"
SMALL = "--rounds 1 --tune 1 --width 64 --layers 1 1 --side 4 --text 3 --long-side 4 --steps 3".split()
ROWS = [
    "official, sequential", "official, jacobi", "twin, sequential", "twin, jacobi", "mlx, sequential", "mlx, jacobi",
    "mlx, rolling", "mlx, auto", "mlx, auto, equal certificate",
]  # fmt: skip


def tables(*words: object) -> list[list[list[str]]]:
    """Cells of the tables it prints, without their heads."""
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    blocks = [block.splitlines() for block in done.stdout.split("\n\n") if block.startswith("| ")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block[2:]] for block in blocks]


def test_both_models(tmp_path):
    random, trained, position, targets = tables(*SMALL, "--trained", write_tiny_model(tmp_path))
    for table in (random, trained):
        assert [row[0] for row in table] == ROWS
        assert [row[4] for row in table[::2][:3]] == ["16 + 16 = 32"] * 3
        assert table[1][4] == table[3][4]
        most = [float(row[5].split(",")[0]) for row in table]
        assert max(most[0], most[2], most[4]) < 1e-3
        assert most[8] <= 1.01 * max(most[1], 2 * most[4])
    assert len(position) == 2 and len(targets) == 9
    assert {row[2] for row in targets} <= {"met", "not met"}


def test_without_a_trained_model():
    random, position, targets = tables(*SMALL)
    assert len(random) == 9 and len(position) == 2 and len(targets) == 4
