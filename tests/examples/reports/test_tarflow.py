"""The report that compares a TarFlow with an iTARFlow."""

from helpers.examples import run_example


def test_tarflow(tmp_path):
    printed = run_example("reports/tarflow.py", tmp_path, "--steps", 2, "--channels", 32, "--count", 4)
    assert "TarFlow" in printed and "iTARFlow" in printed and "16 steps" in printed
