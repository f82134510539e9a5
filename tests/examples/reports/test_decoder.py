"""The script that measures what training a decoder alone gives."""

from __future__ import annotations

from helpers.examples import run_example
from helpers.model_directories import write_image_model


def test_decoder(tmp_path) -> None:
    model = write_image_model(tmp_path / "model")
    printed = run_example(
        "reports/decoder.py", "--model", model, "--pictures", 20, "--steps", 6, "--batch-size", 2, "--lr", 1e-2
    )
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| 0")]
    assert len(rows) == 2 and float(rows[0][1]) == 0 < float(rows[1][1])
    assert all(0 < float(row[5]) != float(row[4]) for row in rows)
    assert "6 steps of 2 pictures" in printed
