"""A short run of examples/reports/soak.py: what grows with every picture would show in ten."""

import re

from helpers.examples import run_example


def test_soak(tmp_path):
    printed = run_example("reports/soak.py", tmp_path, "--pictures", "20", "--videos", "1").splitlines()
    assert [line[:4] for line in printed[1:11]] == [f"{percent:>3}%" for percent in range(10, 101, 10)]
    ratios = dict(re.findall(r"(\w+) ([\d.]+)(?:,|$)", printed[-2].partition(": ")[2]))
    assert float(ratios["files"]) == 1
    assert float(ratios["arrays"]) < 1.1
