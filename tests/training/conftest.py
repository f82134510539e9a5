from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.images import shapes, write_images


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Most tests need no compiled step, and building its kernels takes time on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Six pictures of a square or a disc, with captions."""
    pictures = shapes()
    rows = [{"text": f"a {name}", "captions": [name]} for name in pictures]
    write_images(tmp_path / "pictures", list(pictures.values()), rows)
    return tmp_path / "pictures"
