"""The scripts that measure models of the released sizes, here with tiny ones."""

from __future__ import annotations

import re
import sys

import pytest
from helpers.examples import run_example, run_example_here
from helpers.model_directories import write_image_model, write_video_model
from helpers.paths import DATA


def test_images(tmp_path):
    model = write_image_model(tmp_path / "model")
    printed = run_example_here("reports/full_size_run.py", tmp_path, "--like", model, "--quantize", "mxfp8")
    assert len(re.findall(r" s   peak +\d+\.\d\d GiB   predicted +\d+\.\d\d GiB", printed)) == 5
    assert "likelihood finite: True" in printed and "picture of 8x8 pixels, finite: True" in printed


def test_videos(tmp_path):
    model = write_video_model(tmp_path / "model")
    words = ["--like", model, "--quantize", "mxfp8", "--size", "32x32", "--frames", 9]
    printed = run_example_here("reports/full_size_video.py", tmp_path, *words)
    assert "9 frames of 32x32" in printed and "clean latents finite: True" in printed
    assert "5 frames decoded, finite: True" in printed


def test_lengths_of_videos(tmp_path):
    pytest.importorskip("av")
    printed = run_example("reports/video_memory.py", tmp_path, "--lengths", 5, 9)
    assert "5 frames of 96x96" in printed and "9 frames of 96x96" in printed
    assert "previews" not in printed
    printed = run_example("reports/video_memory.py", tmp_path, "--lengths", 9, "--previews")
    assert "3 previews, " in printed
    assert (tmp_path / "9.mp4").stat().st_size > 0


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_conversion(tmp_path):
    printed = run_example("reports/full_size_conversion.py", tmp_path, "--config", DATA / "t2i/config.yaml")
    assert re.search(r"converted: exit code 0, .* peak anonymous memory \d+ MiB", printed)
    assert "model.safetensors" in printed and "again: exit code 0" in printed
