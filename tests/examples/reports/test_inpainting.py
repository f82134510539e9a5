"""The measures of examples/reports/inpainting.py."""

import sys

import numpy as np
import pytest
from helpers.examples import example_module
from helpers.paths import EXAMPLES
from PIL import Image

sys.path.insert(0, str(EXAMPLES))

import scene_words as words


@pytest.fixture(scope="module")
def report():
    return example_module("reports/inpainting.py")


def test_steps_along_the_edge_of_a_mask(report):
    free = np.zeros((32, 32), bool)
    free[:, 16:] = True
    pixels = np.zeros((32, 32, 3), np.uint8)
    for edge in (16, 11, 18):
        pixels[:, :edge], pixels[:, edge:] = 40, 100
        assert report.step(Image.fromarray(pixels), free) == 60
    for far in (5, 24):
        pixels[:, :far], pixels[:, far:] = 40, 100
        assert report.step(Image.fromarray(pixels), free) == 0
    assert report.step(Image.fromarray(pixels.transpose(1, 0, 2).copy()), free.T) == 0


def test_differences_of_a_part(report):
    first, second = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), (8, 8, 8))
    second.paste((2, 2, 2), (0, 0, 2, 2))
    part = np.array([[True, True, False, False]] * 2)
    assert report.rms(first, second, part) == 2 and report.rms(first, second) == pytest.approx(34**0.5)


def test_trained_scenes_are_and_held_out_ones_are_not(report):
    held_out = words.HeldOut.read()
    assert len(report.TRAINED) == len(report.HELD_OUT) == 10 and set(report.VARIED) <= set(report.TRAINED)
    assert not any(held_out.kinds(scene) for scene in report.TRAINED.values())
    assert {kind for scene in report.HELD_OUT.values() for kind in held_out.kinds(scene)} >= {"background", "pair"}
    assert all(held_out.kinds(scene) for scene in report.HELD_OUT.values())
