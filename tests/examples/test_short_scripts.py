"""Every short script in examples/ runs and says what it promises."""

import re

import pytest
from helpers.examples import run_example_here
from helpers.model_directories import write_video_model
from PIL import Image

from mlx_starflow.media.videos import read_video


def test_likelihood():
    output = run_example_here("likelihood.py", "a red apple")
    nats = [float(number) for number in re.findall(r"(-?\d+\.\d+) nats", output)]
    assert len(nats) == 3 and nats[0] < nats[1]
    assert float(output.split("largest difference is ")[1]) < 1e-3


def test_scoring(tmp_path):
    output = run_example_here("scoring.py", tmp_path)
    nll = [float(number) for number in re.findall(r"(\d+\.\d+) \+-", output)]
    deviations = [float(number) for number in re.findall(r"deviation ([+-]\d+\.\d)", output)]
    car, _, nothing, static = deviations
    assert nll[2] < nll[0] < nll[1] < nll[3]
    # An empty picture is the most likely one and yet no usual one.
    assert -2 < car < 2 and nothing < -2 and static > 4
    assert "taken for: a car on a yellow background" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "car-upside-down.png",
        "car.png",
        "nothing.png",
        "static.png",
    ]


@pytest.mark.slow
def test_inpainting(tmp_path):
    output = run_example_here("inpainting.py", tmp_path / "inpainted.png")
    start, end = (float(number) for number in re.findall(r"(?:from|to) (\d\.\d+)", output))
    assert end < start
    assert Image.open(tmp_path / "inpainted.png").size == (4 * 130 - 2, 128)


def test_interpolation(tmp_path):
    output = run_example_here("interpolation.py", tmp_path / "way.webp")
    assert float(re.search(r"by (\d+\.\d) of", output)[1]) < 4
    assert Image.open(tmp_path / "way.webp").n_frames == 5


def test_stream_video(tmp_path):
    model = write_video_model(tmp_path / "model")
    output = run_example_here("stream_video.py", model, "a cat", tmp_path / "cat.mp4")
    assert output.count("of 17 after") == 17
    assert "cat-longer.mp4: 25 frames of 48x32" in output
    assert len(list(read_video(tmp_path / "cat-longer.mp4"))) == 25
