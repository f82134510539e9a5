"""The report of the server, with a tiny model and few requests."""

from __future__ import annotations

import re

from helpers.examples import run_example
from helpers.model_directories import write_image_model


def test_it_withstands_what_it_is_sent(tmp_path):
    model = write_image_model(tmp_path / "model")
    few = ["--pictures", 3, "--mixed", 18, "--requests", 90]
    printed = run_example("reports/server.py", "--model", model, *few)
    assert re.search(r"added +-?\d+\.\d ms", printed) and "8 at once" in printed
    said = dict(re.findall(r"^  ((?:valid|hostile), .*?) +(\d+)$", printed, re.MULTILINE))
    assert said.keys() <= {"valid, answered", "hostile, refused", "hostile, hung up"}
    assert int(said["valid, answered"]) == 60 and int(said["hostile, refused"]) >= 20
    assert "the server answers: True" in printed and printed.count("exit code 0") == 3
