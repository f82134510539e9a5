"""What training a flow over text minimizes: the ELBO's negative, in nats a character."""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_starflow.models.text_flow import TextFlow
from mlx_starflow.training.loop.objective import Batch, Metrics


def text_nats(flow: TextFlow, batch: Batch) -> mx.array:
    """Minus one draw of the ELBO of each sample of a batch of `TextWindows`, `[B]`, in nats a character."""
    forward, backward = batch["order"][0]
    orders = [backward if block.config.flip else forward for block in flow.blocks]
    characters = batch["characters"]
    return -flow.reading(orders).log_weight(characters, batch["noise"]) / characters.shape[1]


def text_loss(flow: TextFlow, batch: Batch) -> tuple[mx.array, Metrics]:
    """The mean of `text_nats`, and the same in bits a character."""
    loss = text_nats(flow, batch).mean()
    return loss, {"bpc": loss / math.log(2)}
