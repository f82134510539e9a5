"""Flows over text: `TextFlow`, its codebook and its mixture coupling."""

from mlx_starflow.models.text_flow.codebook import Codebook
from mlx_starflow.models.text_flow.mixture import Mixture
from mlx_starflow.models.text_flow.network import (
    UNKNOWN,
    TextBlock,
    TextBlockConfig,
    TextFlow,
    TextFlowConfig,
    gap_orders,
    sanitize,
)

__all__ = [
    "UNKNOWN",
    "Codebook",
    "Mixture",
    "TextBlock",
    "TextBlockConfig",
    "TextFlow",
    "TextFlowConfig",
    "gap_orders",
    "sanitize",
]
