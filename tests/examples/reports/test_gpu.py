"""The report on a GPU, in miniature: its lines, its time limit, and what it says of tests."""

from __future__ import annotations

import time

import pytest
from helpers.examples import example_module, run_example


@pytest.fixture(scope="module")
def gpu():
    return example_module("reports/gpu.py")


def rows(printed: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in cells}


def test_the_lines():
    printed = run_example("reports/gpu.py", "--small", "--no-torch", "--no-tests", "--minutes", 2)
    table = rows(printed)
    assert table["deep"][0] == "2" and table["shallow"][0] == "1" and len(table["deep"]) == 2 + 7
    for name, tokens in (("blocks", 64), ("window", 64), ("sequential", 16)):
        for precision in ("float32", "4 bits, float32 numbers"):
            seconds, evaluations, each, certificate = table[f"mlx, {precision}, {name}, {tokens} tokens"]
            total = int(evaluations.rpartition("= ")[2])
            assert 0 < float(seconds) < 60 and float(each) > 0
            assert total == 48 if name == "sequential" else 0 < total < 150
            assert float(certificate.split(",")[0]) < (1e-3 if name == "sequential" else 0.5)


def test_what_takes_too_long_is_left_out(gpu, capsys):
    clock = gpu.Clock(0.02)
    gpu.timed("slow", lambda: time.sleep(60), clock)
    gpu.timed("later", lambda: 1 / 0, clock)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "| slow | not within 1 | | | |" and second == "| later | no time left | | | |"


def test_tests_that_fail_are_named(gpu, capsys, tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    gpu.run_tests("some", [str(file)], 60)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("  FAILED") and lines[1].startswith("some: 1 failed, 1 passed")
    file.write_text("import time\ndef test_slow(): time.sleep(60)\n")
    gpu.run_tests("slow", [str(file)], 5)
    assert "slow: stopped after 5 s" in capsys.readouterr().out
