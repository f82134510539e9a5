from __future__ import annotations

from pathlib import Path

import pytest
from helpers.images import shapes, write_images


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Six pictures of a square or a disc, with captions."""
    pictures = shapes()
    rows = [{"text": f"a {name}", "captions": [name]} for name in pictures]
    write_images(tmp_path / "pictures", list(pictures.values()), rows)
    return tmp_path / "pictures"
