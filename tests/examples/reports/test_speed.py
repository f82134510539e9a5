"""The speed report runs, and its tables hold what it promises. Times are not looked at."""

import pytest
from helpers.examples import run_example
from helpers.model_directories import write_image_model

pytestmark = pytest.mark.torch

SMALL = "--rounds 1 --tune 1 --width 64 --layers 1 1 --side 4 --text 3 --long-side 4 --steps 3".split()
OFFICIAL = ["official, sequential", "official, jacobi", "reference, sequential", "reference, jacobi"]
STRICT = ["official, jacobi, as right as auto"]
OURS = ["mlx, sequential", "mlx, jacobi", "mlx, rolling", "mlx, auto"]
EQUAL = [
    "mlx, auto, fewest evaluations", "mlx, auto, equal certificate", "mlx, auto, equal certificate, fewest evaluations",
]  # fmt: skip


def tables(*words: object) -> list[list[list[str]]]:
    """Cells of the tables it prints, without their heads."""
    printed = run_example("reports/speed.py", *words)
    blocks = [block.splitlines() for block in printed.split("\n\n") if block.startswith("| ")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block[2:]] for block in blocks]


def test_both_models(tmp_path):
    random, trained, position, targets = tables(*SMALL, "--trained", write_image_model(tmp_path))
    assert [row[0] for row in random] == OFFICIAL + OURS
    assert [row[0] for row in trained] == OFFICIAL + STRICT + OURS + EQUAL
    for table in (random, trained):
        rows = {row[0]: row for row in table}
        certificates = {name: float(row[5].split(",")[0]) for name, row in rows.items()}
        for program in ("official", "reference", "mlx"):
            assert rows[f"{program}, sequential"][4] == "16 + 16 = 32"
            assert certificates[f"{program}, sequential"] < 1e-3
        assert rows["official, jacobi"][4] == rows["reference, jacobi"][4]
        assert certificates["mlx, auto"] <= 1.01e-2
    least = 2 * certificates["mlx, sequential"]
    assert certificates[STRICT[0]] <= 1.01e-2 and certificates[EQUAL[0]] <= 1.01e-2
    for name in EQUAL[1:]:
        assert certificates[name] <= 1.01 * max(certificates["official, jacobi"], least)
    assert len(position) == 2 and len(targets) == 17
    assert {row[2] for row in targets} <= {"met", "not met"}


def test_without_a_trained_model():
    random, position, targets = tables(*SMALL)
    assert len(random) == 8 and len(position) == 2 and len(targets) == 4
