"""Gaps of a text, filled by inversion with given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_starflow.models.text_flow import TextFlow
from mlx_starflow.sampling.decoder import check_finite
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.methods import Method, block_settings
from mlx_starflow.sampling.progress import Watch, watch
from mlx_starflow.sampling.sampler import invert_block


class Filled(NamedTuple):
    """What filling gaps gives.

    Attributes:
        x: the data, `[B, T, size]`.
        z: the noise that `flow(x)` makes of them: what was given in the gaps, and elsewhere that of the given data.
        evaluations: of networks, of all blocks.
    """

    x: mx.array
    z: mx.array
    evaluations: int


def fill_gaps(
    flow: TextFlow,
    x: mx.array,
    noise: mx.array,
    hidden: Sequence[bool],
    method: Method = "sequential",
    progress: Watch = False,
) -> Filled:
    """Sample the hidden characters of data given the others, exactly.

    All blocks read what is given first, so its noise does not depend on what fills the gaps, and a forward pass gives
    it. Then each block is inverted with its given tokens in the cache.

    Args:
        flow: a text flow, reading the hidden characters last: `TextFlow.filling(hidden)`.
        x: data `[B, T, size]`; those of hidden characters are not used.
        noise: standard normal, shaped as x; that of given characters is not used.
        hidden: which characters are, `[T]`.
        method: as `sample` takes it.
        progress: a `Progress`, or whether to show a progress bar; None shows it on a terminal only.

    Raises:
        StarflowError: the method does not fit, or a sample is not finite.
    """
    settings = block_settings(method, len(flow.blocks))
    out = flow(x)
    z = mx.where(mx.array(list(hidden))[None, :, None], noise, out.z)
    tokens = flow.noise_tokens(z)
    batch, length, _ = tokens.shape
    given = length - sum(hidden) // flow.config.patch_size
    guided, evaluations = GuidedFlow(flow, z.shape), 0
    with watch(progress).counting("flow", length * len(flow.blocks), "tok", label="sampling", leave=False) as counter:
        for index in reversed(range(len(flow.blocks))):
            block, decoder = flow.blocks[index], guided.decoder(index, batch, length)
            read = block.permute(flow.tokens(out.hidden[index]))[:, :given] if given else None
            counter.block = index
            tokens = invert_block(decoder, tokens, settings[index], read, counter.advance)
            evaluations += decoder.evaluations
            check_finite(tokens, f"what block {index} made of the noise")
    return Filled(flow.latents(tokens), z, evaluations)
