"""What is fetched with npm: the sprites of scenes, and pictures of other styles."""

from __future__ import annotations

import json
import sys

import numpy as np
from helpers.examples import run_example_here
from helpers.paths import EXAMPLES
from PIL import Image

sys.path.insert(0, str(EXAMPLES))

from scene_pictures import Renderer
from scene_words import HeldOut, objects


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_sprites(npm, tmp_path):
    renderer = Renderer(tmp_path / "scenes")
    assert renderer.names == list(objects())
    # The sheep is one that no caption names, the sign is none at all.
    assert len(renderer.sprites) == len(objects()) + 1
    assert len(renderer.allowed) == len(renderer.sprites) - len(HeldOut.read().objects)


def test_other_styles(npm, tmp_path):
    run_example_here("style_data.py", tmp_path, "--style", "twemoji")
    found = rows(tmp_path)
    assert len(found) == len(objects())
    dog = next(row for row in found if row["text"] == "a dog on a white background")
    assert dog["captions"] == ["a puppy on a white background"]
    picture = np.asarray(Image.open(tmp_path / dog["file_name"]))
    assert picture.shape == (128, 128, 3) and (picture[:16] == 255).all() and (picture[50:80, 50:80] != 255).any()
