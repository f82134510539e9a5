from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image, ImageDraw


@pytest.fixture
def uncompiled():
    """Most tests need no compiled step, and building its kernels takes time on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Six pictures of a square or a disc, with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index, (shape, colour) in enumerate((s, c) for s in ("square", "disc") for c in ("red", "green", "blue")):
        picture = Image.new("RGB", (20, 20), "white")
        draw = ImageDraw.Draw(picture)
        (draw.rectangle if shape == "square" else draw.ellipse)((4, 4, 16, 16), fill=colour)
        picture.save(folder / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "text": f"a {colour} {shape}", "captions": [f"{colour} {shape}"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder
