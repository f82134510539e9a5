"""The report on text flows, in small."""

from __future__ import annotations

import json

from helpers.examples import example_module, run_example


def test_it_trains_and_compares_both(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("the cat sat on the mat, and the dog sat on the cat.\n" * 60)
    out = tmp_path / "out"
    arguments = [text, out, "--steps", 2, "--batch-size", 2, "--length", 16, "--channels", 64, "--draws", 2]
    arguments += ["--gaps", 4, "--candidates", 2, "--sample-length", 20, "--gap-draws", 2]
    run_example("reports/text_flow.py", *arguments, "--only", "flow")
    run_example("reports/text_flow.py", *arguments)
    figures = json.loads((out / "figures.json").read_text())
    assert abs(figures["weights"]["flow"] / figures["weights"]["transformer"] - 1) < 0.2
    assert 3 < figures["flow"]["bits_per_character"] < 6 and 3 < figures["transformer"]["bits_per_character"] < 6
    gaps = figures["gaps"]["4"]
    assert set(gaps) == {"flow", "flow, left side alone", "transformer", "transformer, best of several"}
    assert gaps["flow"]["bits above the flow's"] == [0, 0] and "bits" not in gaps["transformer, best of several"]
    above = gaps["transformer"]["bits"][0] - gaps["flow"]["bits"][0]
    assert abs(gaps["transformer"]["bits above the flow's"][0] - above) < 1e-9
    assert all(0 <= way[name][0] <= 1 for way in gaps.values() for name in ("gaps", "characters"))
    assert figures["sampling"]["sequential"]["evaluations"] == 32
    assert "filled with" in (out / "samples.txt").read_text()


def test_verses_of_what_the_program_bible_prints():
    printed = (
        "\nMatthew 1\n\n  1 The book of the\ngeneration.\n  2 Abraham begat\n Isaac;\n\n1 John 2\n\n  1 My children.\n"
    )
    assert example_module("reports/text_flow.py").verses(printed) == (
        "The book of the generation.\nAbraham begat Isaac;\nMy children.\n"
    )
