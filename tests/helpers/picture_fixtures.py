"""Fixtures of the tiny models that scoring and editing are tested with; their conftests import them."""

from __future__ import annotations

import pytest

from helpers.picture_models import write_tiny_tarflow
from helpers.tiny_model import write_tiny_model
from mlx_starflow.pipelines.picture_flow import PictureFlow, open_picture_flow


@pytest.fixture(scope="session")
def latent_flow(tmp_path_factory) -> PictureFlow:
    """A text-to-picture model of 16 tokens."""
    return open_picture_flow(write_tiny_model(tmp_path_factory.mktemp("text") / "model"))


@pytest.fixture(scope="session")
def pixel_flow(tmp_path_factory) -> PictureFlow:
    """A TarFlow of 3 classes, trained with Gaussian noise."""
    return open_picture_flow(write_tiny_tarflow(tmp_path_factory.mktemp("classes") / "model"))


@pytest.fixture(params=["latents", "pixels"])
def model(request, latent_flow, pixel_flow) -> PictureFlow:
    """Both of them."""
    return latent_flow if request.param == "latents" else pixel_flow
