"""The Python of docs/server.md, against a server of the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.pages import python_blocks
from helpers.paths import ROOT
from helpers.servers import Running
from PIL import Image

from mlx_starflow.server.gallery import Gallery
from mlx_starflow.server.models import Models
from mlx_starflow.server.service import Service


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Running]:
    running = Running(Service(Models(), Gallery(tmp_path / "gallery")))
    yield running
    running.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of variations, which OpenAI itself has retired
def test_it_runs(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").resize((128, 128)).convert("RGB").save("cat.png")
    mask = Image.new("RGBA", (128, 128), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 128, 32))
    mask.save("mask.png")
    code = "\n".join(python_blocks(ROOT / "docs/server.md"))
    assert "http://127.0.0.1:8000/v1" in code
    exec(compile(code.replace("http://127.0.0.1:8000", demo.url), "server.md", "exec"), {"__name__": "server"})
    assert capsys.readouterr().out.split()[::2] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    with Image.open("pizza-1.png") as made:
        assert made.size == (128, 128)
