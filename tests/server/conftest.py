"""A server of tiny models of each kind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.model_directories import write_class_model, write_image_model, write_video_model
from helpers.servers import Running

from mlx_starflow.server.gallery import Gallery
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.logs import Log
from mlx_starflow.server.models import Models
from mlx_starflow.server.service import Service


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of each kind."""
    folder = tmp_path_factory.mktemp("served")
    return {
        "pictures": write_image_model(folder / "pictures"),
        "labels": write_class_model(folder / "labels"),
        "movies": write_video_model(folder / "movies"),
    }


@pytest.fixture(scope="module")
def server(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of all of them."""
    models = Models([str(path) for path in directories.values()])
    log = Log(as_json=True, stream=open(os.devnull, "w"))  # noqa: SIM115
    running = Running(Service(models, Gallery(tmp_path_factory.mktemp("gallery")), Limits(images=6), log=log))
    yield running
    running.close()
