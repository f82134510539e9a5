"""What exact likelihood gives: scores, surprise maps, prompt fit, classification, typicality.

The names that need a whole model with its autoencoder are imported when they are used: flows alone are scored without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from mlx_starflow.likelihood.calibration import Reference as Reference
    from mlx_starflow.likelihood.calibration import calibrate as calibrate
    from mlx_starflow.likelihood.heatmap import heat_map as heat_map
    from mlx_starflow.likelihood.prompts import best_of as best_of
    from mlx_starflow.likelihood.prompts import classify as classify
    from mlx_starflow.likelihood.prompts import prompt_fit as prompt_fit
    from mlx_starflow.likelihood.scores import Score as Score
    from mlx_starflow.likelihood.scores import score as score

_HOMES = {
    "heat_map": "heatmap",
    "Score": "scores",
    "score": "scores",
    "best_of": "prompts",
    "classify": "prompts",
    "prompt_fit": "prompts",
    "Reference": "calibration",
    "calibrate": "calibration",
}

__all__ = [
    "HALF_LOG_2PI",
    "Nll",
    "Reference",
    "Score",
    "best_of",
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


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
