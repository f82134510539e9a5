"""Every short script in examples/ runs and says what it promises."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *words: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_likelihood():
    output = run("likelihood.py", "a red apple")
    nats = [float(number) for number in re.findall(r"(-?\d+\.\d+) nats", output)]
    assert len(nats) == 3 and nats[0] < nats[1]
    assert float(output.split("largest difference is ")[1]) < 1e-3
