"""The README's table of memory is the one that its script prints."""

from helpers.examples import run_example
from helpers.paths import ROOT


def test_memory():
    printed = run_example("reports/memory.py")
    assert len(printed.splitlines()) == 8
    assert printed in (ROOT / "README.md").read_text()
