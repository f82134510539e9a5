"""A model, noise and conditions to try sampling methods with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.directory import ModelDirectory, load_flow
from mlx_starflow.model_dir.hub import find_model
from mlx_starflow.model_dir.weights import dtype_name
from mlx_starflow.models.flow import Flow, frame_count, products_in
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.pipelines import VideoPipeline, load
from mlx_starflow.pipelines.class_labels import own_settings
from mlx_starflow.sampling import Certificate, SamplingPlan, SamplingTrace, certify, sample
from mlx_starflow.sampling.methods import Method

PROMPTS = ("a fox", "a red apple on a blue background", "a rocket above a castle", "a cat to the left of a dog")


@dataclass(frozen=True)
class Task:
    """A flow and what it is to sample: arguments of `sampling.sample`.

    Attributes:
        flow: the flow.
        z: noise of all samples.
        text, null_text: what they are conditioned on, and what stands for no condition; None if the flow has none.
        guidance: its weight.
    """

    flow: Flow
    z: mx.array
    text: mx.array | None = None
    null_text: mx.array | None = None
    guidance: float = 0.0

    @property
    def images(self) -> int:
        """How many samples there are."""
        return self.z.shape[0]

    @property
    def length(self) -> int:
        """Tokens of one sample's noise."""
        return self.flow.noise_tokens(self.z).shape[1]

    @property
    def lengths(self) -> list[int]:
        """Tokens of one sample in each block, data side first: blocks of an iTARFlow may have their own patches."""
        return [block.sequences(1, self.length, self.frames)[1] for block in self.flow.blocks]

    @property
    def frames(self) -> int:
        """Latent frames of each sample; 1 of pictures."""
        return frame_count(self.z.shape)

    def rows(self) -> list[int]:
        """Sequences that each block sees at once, data side first: the samples, of videos in some blocks their frames,
        and twice as many where guided."""
        conditions = self.flow.conditions(self.z.shape, self.text, self.null_text, self.guidance).blocks
        blocks = zip(self.flow.blocks, conditions, strict=True)
        counts = [(block.sequences(self.images, self.length, self.frames)[0], each.guided) for block, each in blocks]
        return [count * (2 if guided else 1) for count, guided in counts]

    def sample(self, method: Method) -> tuple[mx.array, list[int]]:
        """The samples, and the network evaluations of each block, deep block first."""
        trace = SamplingTrace()
        x = sample(self.flow, self.z, self.text, self.null_text, self.guidance, method, trace=trace)
        return x, trace.evaluations

    def certify(self, x: mx.array) -> Certificate:
        """How far the flow, run forwards over samples x, is from the noise."""
        return certify(self.flow, x, self.z, self.text, self.null_text, self.guidance)


@dataclass(frozen=True)
class Trials:
    """A task for a model: the directory it is in, and its sampling plan, if it has one."""

    directory: Path
    task: Task
    plan: SamplingPlan | None


def prepare(
    model: str | Path,
    prompts: Sequence[str] | None = None,
    *,
    guidance: float | None = None,
    seed: int = 0,
    dtype: mx.Dtype | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Trials:
    """One sample a prompt, with seeds that count up from `seed`; a TarFlow's samples are of random classes.

    The guidance, and the size (width, height) of images from prompts, in pixels, are the model's own by default. A
    model of videos makes videos of `frames`, by default as long as those that it was trained on; 1 is a picture.
    `prompts` None: `PROMPTS`, or the first of them where videos are made.

    Raises:
        StarflowError: the model cannot be read, there is no prompt, or the guidance or the frames do not suit the
            model.
    """
    if prompts is not None and not prompts:
        raise StarflowError("there is no prompt")
    directory = find_model(model)
    flow = load_flow(directory, dtype=dtype)
    video = flow.config.video if isinstance(flow, STARFlow) else None
    if frames is not None and (video is None or not 1 <= frames <= video[0]):
        most = "it makes pictures" if video is None else f"at most {video[0]}, as it was trained on, and at least 1"
        raise StarflowError(f"{model} is not measured with {frames} frames: {most}")
    if video is not None and frames is None and isinstance(flow, STARFlow) and flow.config.txt_size:
        frames = video[0]
    if prompts is None:
        prompts = PROMPTS if (frames or 1) == 1 else PROMPTS[:1]
    seeds = range(seed, seed + len(prompts))
    plan = SamplingPlan.find(directory, dtype_name(products_in(flow)))
    if isinstance(flow, STARFlow) and flow.config.txt_size:
        pipe = load(directory, dtype=dtype, low_memory=True)
        shape: tuple[int, ...] = pipe.latent_shape(size)
        if isinstance(pipe, VideoPipeline) and (frames or 1) > 1:
            size = size or pipe.settings.size
            shape = (pipe.format.latent_frames(frames or 1), *pipe.latent_shape(size))
            pipe.check_size(size, len(prompts), guidance=guidance, frames=frames or 1)
            texts = pipe.encode_prompts([*prompts, ""], size, pipe.settings.fps)
        else:
            pipe.check_size(size or pipe.size, len(prompts), guidance=guidance)
            texts = pipe.encode_prompts([*prompts, ""])
        weight = pipe.settings.guidance if guidance is None else guidance
        z = pipe.settings.temperature * mx.array(draw_noise(seeds, shape))
        return Trials(directory, Task(flow, z, texts[:-1], texts[-1:], weight), plan)
    if isinstance(flow, STARFlow):
        config = flow.config
        shape = (config.img_size, config.img_size, config.channel_size)
        z = mx.array(draw_noise(seeds, shape if (frames or 1) == 1 else (frames or 1, *shape)))
        return Trials(directory, Task(flow, z, guidance=guidance or 0.0), plan)
    settings = own_settings(ModelDirectory(directory))
    z = settings.temperature * mx.array(draw_noise(seeds, flow.var.shape))
    classes = flow.config.num_classes
    labels = mx.array([index % classes for index in range(len(prompts))]) if classes else None
    return Trials(directory, Task(flow, z, labels, guidance=settings.guidance if guidance is None else guidance), plan)
