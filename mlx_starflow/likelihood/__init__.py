"""What exact likelihood gives: scores, surprise maps, prompt fit, classification, typicality."""

from mlx_starflow.likelihood.calibration import CalibrationStatistics, calibrate
from mlx_starflow.likelihood.heatmap import heat_map
from mlx_starflow.likelihood.nll import (
    HALF_LOG_2PI,
    Nll,
    drawn_nats,
    exact_nll,
    standard_error,
    token_nats,
    training_noise,
    with_noise,
)
from mlx_starflow.likelihood.prompts import Classification, classify, prompt_fit
from mlx_starflow.likelihood.protocol import ImageModel, ImageOrVideo
from mlx_starflow.likelihood.scores import Score, score

__all__ = [
    "HALF_LOG_2PI",
    "CalibrationStatistics",
    "Classification",
    "ImageModel",
    "ImageOrVideo",
    "Nll",
    "Score",
    "calibrate",
    "classify",
    "drawn_nats",
    "exact_nll",
    "heat_map",
    "prompt_fit",
    "score",
    "standard_error",
    "token_nats",
    "training_noise",
    "with_noise",
]
