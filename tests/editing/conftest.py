"""See picture_fixtures."""

from helpers.picture_fixtures import latent_flow, model, pixel_flow

__all__ = ["latent_flow", "model", "pixel_flow"]
