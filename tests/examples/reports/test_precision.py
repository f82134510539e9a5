"""The precision report runs, and its table holds what it promises."""

from helpers.examples import run_example
from helpers.model_directories import write_image_model


def test_the_table(tmp_path):
    words = ["--model", write_image_model(tmp_path), "--prompts", 1, "--pictures", 2, "--tolerances", "0.01"]
    printed = run_example("reports/precision.py", *words)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    table = {row[0]: row[1:] for row in rows[2:]}
    assert {len(row) for row in rows} == {7} and list(table)[:3] == [
        "float32",
        "float16 alone",
        "float16, float32 between",
    ]
    for name, exact in (("float32", 1e-5), ("8 bits, float32", 1e-5), ("float16, float32 between", 1e-2)):
        sequential, _, _, _, _, back = table[name]
        assert float(sequential.split(",")[0]) <= exact and float(back.split(",")[0]) <= exact
    assert table["float32"][3].startswith("+0e+00") and table["float32"][4] == "same"
