"""The measures of examples/reports/likelihood.py."""

import re

import mlx.core as mx
import numpy as np
import pytest
from helpers.examples import example_module, run_example_here
from helpers.scenes import write_sprites
from PIL import Image


@pytest.fixture(scope="module")
def report():
    return example_module("reports/likelihood.py")


def test_auroc(report):
    assert report.auroc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 1
    assert report.auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 0
    assert report.auroc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert report.auroc(np.array([0.0, 2.0]), np.array([1.0])) == 0.5


def test_jacobian(report):
    matrix = np.random.default_rng(0).standard_normal((4, 4))
    point = np.random.default_rng(1).standard_normal((1, 2, 2)).astype(np.float32)

    def function(x):
        return (np.sin(x.reshape(len(x), 4)) @ matrix.T).reshape(x.shape)

    expected = matrix * np.cos(point.reshape(4))
    np.testing.assert_allclose(report.jacobian(function, point), expected, atol=1e-3)


def test_the_tiny_flow_mixes_its_dimensions(report):
    flow = report.tiny_flow()
    point = np.random.default_rng(1).standard_normal((1, 4, 4, 2)).astype(np.float32)
    numeric = report.jacobian(lambda batch: np.array(flow(mx.array(batch)).z), point)
    assert (np.abs(numeric) > 1e-4).mean() > 0.5
    exact = float(np.array(flow(mx.array(point)).log_det).sum())
    assert np.linalg.slogdet(numeric)[1] == pytest.approx(exact, abs=1e-3)


def test_spoiled_pictures(report):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = Image.fromarray(pixels)
    moved = np.asarray(report.shuffled(image, np.random.default_rng(2), side=8))
    assert moved.shape == pixels.shape and not np.array_equal(moved, pixels)
    assert np.array_equal(np.sort(moved.reshape(-1)), np.sort(pixels.reshape(-1)))
    small = np.asarray(report.shrunk(image))
    assert (small[:12] == 255).all() and (small[12:20, 12:20] != 255).any()
    assert report.noise_picture((5, 3), np.random.default_rng(0)).size == (5, 3)


def test_the_script(tmp_path):
    printed = run_example_here("reports/likelihood.py", write_sprites(tmp_path), tmp_path, "--only", "exactness")
    gap, slope = (float(number) for number in re.findall(r"difference (\d\.\de-\d+)", printed))
    assert gap < 1e-5 and slope < 1e-3
