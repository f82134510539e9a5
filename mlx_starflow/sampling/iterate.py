"""Iterative denoising: from a noise level to 0 in many steps, each with the flow's exact score (arXiv 2604.20041)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.itarflow import ITarFlow
from mlx_starflow.sampling.denoise import denoise


def noise_levels(highest: float, lowest: float, steps: int) -> list[float]:
    """As many levels as steps, evenly spaced, from the highest down to the lowest; one step starts at the highest.

    Raises:
        StarflowError: there is no step.
    """
    if steps < 1:
        raise StarflowError(f"the number of denoising steps must be 1 or more, not {steps}")
    return [float(level) for level in np.linspace(highest, lowest, steps)]


def iterate(
    flow: ITarFlow,
    x: mx.array,
    labels: mx.array | None,
    levels: Sequence[float],
    clip: bool = False,
    *,
    noise: mx.array | None = None,
    progress: bool | None = False,
    preview: Callable[[int, mx.array], None] = lambda step, clean: None,
) -> mx.array:
    """Denoise data of noise level `levels[0]` step by step, at each of the levels and then to 0.

    At level t the flow's exact score says what the clean data are, x0 = x + t^2 * d log p_t(x)/dx. With v = (x - x0)/t,
    the noise, the next level t' gets x - (t - t') v. The last step gives x0 itself.

    Args:
        flow: an iTARFlow.
        x: data `[B, H, W, C]` with noise of standard deviation `levels[0]`, such as `sample` gives.
        labels: of the data, `[B]`, or None.
        levels: from the highest down, all above 0; 0 comes after them.
        clip: limit each x0 to -1..1.
        noise: for the stochastic variant, standard normal `[len(levels) - 1, B, H, W, C]`: with a = (t'/t)^2 the next
            level gets x0 + t' (sqrt(a) v + sqrt(1 - a) noise).
        progress: show a progress bar; None shows it on a terminal only.
        preview: is called after each step with its number, from 1 on, and x0.

    Returns:
        Clean data, float32.

    Raises:
        StarflowError: the levels do not fall, the noise has the wrong shape, or a step is not finite.
    """
    if not isinstance(flow, ITarFlow):
        raise StarflowError("this flow knows no noise levels, so it denoises in one step: use denoise")
    falling = all(later < level for level, later in itertools.pairwise([*levels, 0.0]))
    if not levels or not falling or not math.isfinite(levels[0]):
        raise StarflowError("noise levels must fall from step to step, and all be above 0")
    wanted = (len(levels) - 1, *x.shape)
    if noise is not None and noise.shape != wanted:
        raise StarflowError(f"noise has shape {list(noise.shape)}; these steps need {list(wanted)}")
    x = x.astype(mx.float32)
    hide = None if progress is None else not progress
    steps = list(itertools.pairwise([*levels, 0.0]))
    for step, (level, later) in enumerate(tqdm(steps, desc="denoising", unit="step", disable=hide, leave=False)):
        clean = denoise(flow.at(level), x, labels)
        if clip:
            clean = mx.clip(clean, -1, 1)
        preview(step + 1, clean)
        if not later:
            return clean
        v = (x - clean) / level
        if noise is None:
            x = x - (level - later) * v
        else:
            kept = (later / level) ** 2
            x = clean + later * (math.sqrt(kept) * v + math.sqrt(1 - kept) * noise[step])
        mx.eval(x)
    raise AssertionError  # the last level is followed by 0
