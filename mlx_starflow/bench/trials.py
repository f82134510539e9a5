"""A model, noise and conditions to try sampling methods with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.hub import find_model
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.pipelines import load
from mlx_starflow.sampling import SamplingPlan

PROMPTS = ("a red apple", "a cat face", "a rocket", "a slice of pizza")


@dataclass
class Trials:
    """Arguments of `sampling.sample` for a few samples of a model in `directory`, and its sampling plan if it has one.

    `text` and `null_text` are None, and the guidance is 0, for a model without conditions.
    """

    directory: Path
    flow: Any
    z: mx.array
    text: mx.array | None
    null_text: mx.array | None
    guidance: float
    plan: SamplingPlan | None

    @property
    def condition(self) -> dict[str, Any]:
        return {"text": self.text, "null_text": self.null_text, "guidance": self.guidance}


def prepare(
    model: str | Path,
    prompts: Sequence[str] = PROMPTS,
    *,
    guidance: float | None = None,
    seed: int = 0,
    dtype: mx.Dtype | None = None,
    size: tuple[int, int] | None = None,
) -> Trials:
    """One sample a prompt, with seeds that count up from `seed`; a TarFlow's samples are of random classes.

    The guidance, and the size (width, height) of pictures from prompts, in pixels, are the model's own by default.

    Raises:
        StarflowError: the model cannot be read, there is no prompt, or the guidance does not suit the model.
    """
    if not prompts:
        raise StarflowError("there is no prompt")
    directory = find_model(model)
    flow = load_flow(directory, dtype=dtype)
    seeds = range(seed, seed + len(prompts))
    plan = SamplingPlan.find(directory)
    if isinstance(flow, STARFlow) and flow.config.txt_size:
        pipe = load(directory, dtype=dtype, low_memory=True)
        texts = pipe.encode_prompts([*prompts, ""])
        mx.eval(texts)
        weight = pipe.settings.guidance if guidance is None else guidance
        z = pipe.settings.temperature * mx.array(draw_noise(seeds, pipe.latent_shape(size)))
        return Trials(directory, flow, z, texts[:-1], texts[-1:], weight, plan)
    if isinstance(flow, STARFlow):
        config = flow.config
        z = mx.array(draw_noise(seeds, (config.img_size, config.img_size, config.channel_size)))
        return Trials(directory, flow, z, None, None, guidance or 0.0, plan)
    z = mx.array(draw_noise(seeds, flow.var.shape))
    classes = flow.config.num_classes
    labels = mx.array([index % classes for index in range(len(prompts))]) if classes else None
    return Trials(directory, flow, z, labels, None, guidance or 0.0, plan)
