"""Tables of results."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from helpers.commands import message

from mlx_starflow.media.tables import write_csv, write_json

ROWS = [{"picture": "a, b.png", "nll": 0.5, "map": [[1.0]]}, {"picture": "c.png", "nll": None, "map": None}]


def test_csv(tmp_path):
    write_csv(ROWS, tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert rows == [{"picture": "a, b.png", "nll": "0.5"}, {"picture": "c.png", "nll": ""}]
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_json(tmp_path, capsys):
    write_json({"pictures": ROWS}, tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == {"pictures": ROWS}
    write_json([1], Path("-"))
    assert json.loads(capsys.readouterr().out) == [1]


def test_mistakes(tmp_path):
    assert "cannot be written" in message(write_csv, ROWS, tmp_path)
    assert "cannot be written" in message(write_json, ROWS, tmp_path / "none" / "table.json")
