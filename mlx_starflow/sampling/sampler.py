"""Noise -> data through all blocks of a flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_starflow.errors import StarflowError
from mlx_starflow.sampling import jacobi, sequential
from mlx_starflow.sampling.decoder import BlockDecoder, Guidance, check_finite
from mlx_starflow.sampling.guidance import guidance_rule
from mlx_starflow.sampling.jacobi import JacobiSettings

METHODS = ("sequential", "jacobi")


@dataclass
class SamplingTrace:
    """What sampling did, filled in if a trace is given to `sample`.

    Attributes:
        evaluations: network evaluations of each block, deep block first.
        states: data after each block, deep block first, shaped as the result (only if `keep_states`).
    """

    keep_states: bool = False
    evaluations: list[int] = field(default_factory=list)
    states: list[mx.array] = field(default_factory=list)


def sample(
    flow: Any,
    z: mx.array,
    text: mx.array | None = None,
    null_text: mx.array | None = None,
    guidance: float = 0.0,
    method: str = "sequential",
    *,
    jacobi_settings: JacobiSettings | None = None,
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    guide_what: str = "ab",
    progress: bool | None = False,
    trace: SamplingTrace | None = None,
) -> mx.array:
    """Invert the flow: noise -> data, the exact inverse of `flow(x, text).z` at guidance 0.

    Args:
        flow: a STARFlow or a TarFlow.
        z: noise, standard normal where the flow's likelihood is meant: `[B, H, W, C]`, or a TarFlow's tokens
            `[B, N, C * p * p]` (a TarFlow with a learned prior scales them first: see `TarFlow.standardize`).
        text: embeddings `[B, L, D]`, or a TarFlow's integer labels `[B]`; None for a flow without either.
        null_text: embeddings of the empty prompt, `[B or 1, L, D]`; needed for guidance. A TarFlow's is a label, by
            default -1.
        guidance: weight w >= 0 of classifier-free guidance in the blocks that read the condition (see
            `guidance.guide` and, for a TarFlow, `guidance.extrapolate`).
        method: "sequential", or "jacobi" for block-wise Jacobi iteration.
        jacobi_settings: block size, threshold and most sweeps for "jacobi".
        attn_temp: attention logits are divided by this; in a TarFlow those of guidance's null predictions only.
        annealed_guidance: let the weight grow linearly over the sequence.
        guide_what: what a TarFlow's guidance changes: "b" the mean, "a" the log-scale, "ab" both.
        progress: show a progress bar; None shows it on a terminal only.
        trace: is filled with what was done.

    Returns:
        Data `[B, H, W, C]`, float32, still with the flow's training noise: see `denoise`.

    Raises:
        StarflowError: a wrong argument, or a sample that is not finite.
    """
    check_arguments(guidance, method, attn_temp)
    tokens = flow.noise_tokens(z)
    batch, length, _ = tokens.shape
    conditions = flow.conditions(z.shape, text, null_text, guidance)
    rule = Guidance(guidance_rule(conditions.rule, guide_what), guidance, annealed_guidance)

    total = sum(length for block in flow.blocks if not block.is_identity)
    with tqdm(total=total, desc="sampling", unit="tok", disable=progress_off(progress), leave=False) as bar:
        for index in reversed(range(len(flow.blocks))):
            block = flow.blocks[index]
            evaluations = 0
            if not block.is_identity:
                condition = conditions.blocks[index]
                temperature: float | mx.array = attn_temp
                if conditions.temper_null_only:
                    temperature = null_temperature(attn_temp, batch) if condition.guided else 1.0
                decoder = BlockDecoder(
                    block, batch, length, conditions.table, condition, rule if condition.guided else None, temperature
                )
                tokens = invert_block(decoder, tokens, method, jacobi_settings, bar.update)
                evaluations = decoder.evaluations
            if trace is not None:
                trace.evaluations.append(evaluations)
                if trace.keep_states:
                    trace.states.append(flow.latents(tokens, z.shape))
    check_finite(tokens, "the sample")
    return flow.latents(tokens, z.shape)


def invert_block(
    decoder: BlockDecoder,
    z: mx.array,
    method: str,
    settings: JacobiSettings | None,
    advance: Callable[[int], None],
) -> mx.array:
    """Invert one block: noise `[B, N, C]` -> data, both in data order."""
    flip = decoder.block.config.flip
    if flip:
        z = z[:, ::-1]
    if method == "sequential":
        x = sequential.invert(decoder, z, advance)
    else:
        x = jacobi.invert(decoder, z, settings or JacobiSettings(), advance)
    return x[:, ::-1] if flip else x


def null_temperature(attn_temp: float, batch: int) -> mx.array:
    """Attention temperatures of a guided batch, `[2B, 1, 1, 1]`: 1 with the condition, `attn_temp` without it."""
    return mx.array([1.0] * batch + [attn_temp] * batch).reshape(-1, 1, 1, 1)


def check_arguments(guidance: float, method: str, attn_temp: float) -> None:
    if method not in METHODS:
        raise StarflowError(f"unknown sampling method {method!r}; it must be one of {', '.join(METHODS)}")
    if not guidance >= 0:
        raise StarflowError(f"guidance must be 0 or more, not {guidance:g}")
    if not attn_temp > 0:
        raise StarflowError(f"the attention temperature must be greater than 0, not {attn_temp:g}")


def progress_off(progress: bool | None) -> bool | None:
    """tqdm's `disable`: None hides the bar unless standard error is a terminal."""
    return None if progress is None else not progress
