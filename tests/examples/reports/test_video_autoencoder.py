"""The report on the video autoencoder runs: both ways agree, and memory is what is planned, or less."""

import re

import pytest
from helpers.examples import run_example

from mlx_starflow.kernels import on_cpu


@pytest.mark.skipif(not on_cpu(), reason="a GPU has convolutions of its own")
def test_both_ways():
    printed = run_example("reports/video_autoencoder.py", "--small", "--size", "192x128")
    assert [line.split(":")[0] for line in printed.splitlines()[1:]] == [
        "encoding", "decoding", "latent frame 1", "latent frame 2",
    ]  # fmt: skip
    assert all(float(each) < 1e-5 for each in re.findall(r"difference (\S+) of", printed))
    assert printed.count("finite: True") == 2


def test_decoding_alone():
    printed = run_example(
        "reports/video_autoencoder.py", "--small", "--size", "32x32", "--frames", "1", "--decode-only"
    )
    assert [line.split(":")[0] for line in printed.splitlines()[1:]] == ["latent frame 1"]
