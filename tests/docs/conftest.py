"""What the pages take a reader to have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.model_directories import write_image_model, write_video_model
from helpers.upscalers import srvgg_tensors, write_upscaler
from PIL import Image

from mlx_starflow.media.videos import VideoWriter


@pytest.fixture(scope="module")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a video and models, small, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(1)
    (folder / "my-pictures").mkdir()
    for name in ("cat", "dog", "car", "heart", "tulip", "new"):
        picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
        picture.save(folder / f"{name}.png")
        picture.save(folder / f"my-pictures/{name}.png")
        (folder / f"my-pictures/{name}.txt").write_text(f"a {name}")
        (folder / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            picture.save(folder / f"pictures/{name}/{index}.png")
    (folder / "photos").symlink_to(folder / "my-pictures")
    (folder / "prompts.txt").write_text("a red apple\na rocket\n")
    write_image_model(folder / "my-model")
    write_video_model(folder / "my-video-model")
    write_upscaler(folder / "upscaler.pth", srvgg_tensors())
    with VideoWriter(folder / "street.mp4", 16) as writer:
        for level in range(17):
            writer.add(Image.new("RGB", (32, 32), (15 * level, 80, 120)))
    return folder
