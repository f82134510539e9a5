"""What exact inversion gives: images to noise and back, inpainting, re-prompting, variations, interpolation."""

from mlx_starflow.editing.inpainting import Inpainting, inpaint
from mlx_starflow.editing.inversion import Encoded, RoundTrip, decode, encode
from mlx_starflow.editing.masks import read_mask
from mlx_starflow.editing.paths import Edit, interpolate, reprompt, vary

__all__ = [
    "Edit",
    "Encoded",
    "Inpainting",
    "RoundTrip",
    "decode",
    "encode",
    "inpaint",
    "interpolate",
    "read_mask",
    "reprompt",
    "vary",
]
