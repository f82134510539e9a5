"""Flows over text: `TextFlow`, its codebook and its mixture coupling."""

from mlx_starflow.models.text_flow.block import TextBlock, TextBlockConfig
from mlx_starflow.models.text_flow.codebook import Codebook
from mlx_starflow.models.text_flow.mixture import Mixture
from mlx_starflow.models.text_flow.network import (
    UNKNOWN,
    TextFlow,
    TextFlowConfig,
    sanitize,
)
from mlx_starflow.models.text_flow.reading import Reading, gap_orders

__all__ = [
    "UNKNOWN",
    "Codebook",
    "Mixture",
    "Reading",
    "TextBlock",
    "TextBlockConfig",
    "TextFlow",
    "TextFlowConfig",
    "gap_orders",
    "sanitize",
]
