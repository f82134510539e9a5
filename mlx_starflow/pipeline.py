"""Text to pictures: tokenizer, text encoder, flow, denoising, decoder."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_starflow import __version__
from mlx_starflow.errors import StarflowError
from mlx_starflow.hub import find_model
from mlx_starflow.media import to_images
from mlx_starflow.memory import available, metal_limits, plan
from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS, AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.noise import digest, draw_noise, draw_seed
from mlx_starflow.sampling import JacobiSettings, SamplingTrace, denoise, sample
from mlx_starflow.sampling.sampler import check_arguments, progress_off
from mlx_starflow.tokenizer import Tokenizer
from mlx_starflow.weights import load_flow, load_text_encoder, load_vae, read_config


@dataclass(frozen=True)
class GenerationSettings:
    """How pictures are sampled. A model directory's `config.json` may hold its own defaults under "pipeline".

    Attributes:
        guidance: weight of classifier-free guidance, 0 or more.
        temperature: the noise is multiplied by this; below 1 gives more typical, less varied pictures.
        method: "sequential" or "jacobi".
        attn_temp: attention logits are divided by this.
        denoise: take one score step, which removes the noise that the flow was trained with, before decoding.
        size: (width, height) in pixels; None is the size that the model was trained at.
    """

    guidance: float = 0.0
    temperature: float = 1.0
    method: str = "sequential"
    attn_temp: float = 1.0
    denoise: bool = True
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_arguments(self.guidance, self.method, self.attn_temp)
        if not self.temperature >= 0:
            raise StarflowError(f"the temperature must be 0 or more, not {self.temperature:g}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GenerationSettings:
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise StarflowError(f"unknown setting {', '.join(unknown)}; this picture may be of a newer version")
        size = values.get("size")
        return cls(**{**values, "size": tuple(size) if size else None})

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass
class GenerationStats:
    """What generating cost.

    Attributes:
        seconds: wall time of each phase: text, flow, denoise, decode (loading included if it was put off).
        memory: bytes that MLX held at most in each phase.
        tokens: tokens sampled, over all blocks and pictures.
        evaluations: network evaluations of each flow block, deep block first, summed over batches.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    evaluations: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds["flow"] if self.seconds.get("flow") else 0.0

    @property
    def peak_memory(self) -> int:
        return max(self.memory.values(), default=0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        mx.reset_peak_memory()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.memory[name] = max(self.memory.get(name, 0), mx.get_peak_memory())

    def count(self, evaluations: list[int], tokens: int) -> None:
        """Add what sampling one batch took."""
        before = self.evaluations or [0] * len(evaluations)
        self.evaluations = [a + b for a, b in zip(before, evaluations, strict=True)]
        self.tokens += tokens

    def __str__(self) -> str:
        phases = ", ".join(
            f"{name} {seconds:.2f} s {self.memory[name] / 2**20:.0f} MiB" for name, seconds in self.seconds.items()
        )
        evaluations = "+".join(map(str, self.evaluations))
        return f"{phases}; {self.tokens_per_second:.0f} tokens/s, {evaluations} network evaluations"


@dataclass
class GenerationResult:
    """Pictures, prompt by prompt and seed by seed, and all there is to know about them.

    Attributes:
        images: PIL pictures.
        latents: what was decoded, `[B, h, w, C]`.
        noise: what the pictures came from, before the temperature, `[B, h, w, C]`.
        prompts: prompt of each picture.
        seeds: seed of each picture; None where the noise was given.
        steps: for each picture the states from noise to latents, decoded, if asked for.
        metadata: of each picture, for `media.save_image`.
    """

    images: list[Image.Image]
    latents: mx.array
    noise: np.ndarray
    prompts: list[str]
    seeds: list[int | None]
    steps: list[list[Image.Image]]
    metadata: list[dict[str, Any]]
    settings: GenerationSettings
    stats: GenerationStats


class Pipeline:
    """A flow with its text encoder and its autoencoder, read from a model directory; see `load`.

    Attributes (the networks are read when they are first used):
        flow, text_encoder, tokenizer, vae: the networks.
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
        low_memory: hold one network at a time, and read it again for the next pictures.
    """

    def __init__(self, name: str, directory: Path, *, dtype: mx.Dtype | None = None, low_memory: bool = False):
        self.name, self.directory, self.dtype, self.low_memory = name, directory, dtype, low_memory
        config = read_config(directory)
        if config.get("model_type") != "starflow" or not config.get("txt_size"):
            raise StarflowError(f"{name} does not read prompts: use load_flow and sample in Python")
        for part in ("text_encoder", "vae"):
            if not (directory / part).is_dir():
                raise StarflowError(f"{directory} is a flow alone: generating needs its {part}/ folder too")
        self.config = FlowConfig.from_dict(config)
        self.vae_config = AutoencoderKLConfig.from_dict(read_config(directory / "vae"))
        self.settings = GenerationSettings.from_dict({"guidance": self.config.cfg, **config.get("pipeline", {})})

    @cached_property
    def flow(self) -> STARFlow:
        return load_flow(self.directory, dtype=self.dtype)

    @cached_property
    def _text(self) -> tuple[T5Encoder, Tokenizer]:
        return load_text_encoder(self.directory / "text_encoder", dtype=self.dtype)

    @property
    def text_encoder(self) -> T5Encoder:
        return self._text[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._text[1]

    @cached_property
    def vae(self) -> AutoencoderKL:
        return load_vae(self.directory / "vae", dtype=self.dtype)

    def _done_with(self, part: str) -> None:
        """Let go of a network that the next phases do not need, if memory is short."""
        if self.low_memory:
            self.__dict__.pop(part, None)
            mx.clear_cache()

    def encode_prompts(self, prompts: Sequence[str]) -> mx.array:
        """Prompts -> text embeddings `[B, L, D]`, zero at padding. Warns about a prompt that is cut."""
        length = self.config.txt_size
        ids, mask, truncated = self.tokenizer.batch(list(prompts), length)
        for prompt, cut in zip(prompts, truncated, strict=True):
            if cut:
                warnings.warn(
                    f"the prompt is longer than the {length} tokens this model reads; its end is ignored: {prompt!r}",
                    stacklevel=2,
                )
        return self.text_encoder.encode(mx.array(ids), mx.array(mask))

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(height, width, channels) of the latents of a picture of `size` (width, height) in pixels."""
        config, scale = self.config, self.vae_config.downscale
        if size is None:
            return config.img_size, config.img_size, config.channel_size
        step = scale * config.patch_size
        width, height = size
        if min(size) < step or width % step or height % step:
            raise StarflowError(f"a size of {width}x{height} does not fit: this model wants multiples of {step} pixels")
        return height // scale, width // scale, config.channel_size

    @metal_limits()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        images: int = 1,
        noise: np.ndarray | None = None,
        keep_steps: bool = False,
        batch_size: int = 8,
        jacobi_settings: JacobiSettings | None = None,
        progress: bool | None = False,
        **settings: Any,
    ) -> GenerationResult:
        """Make pictures.

        Args:
            prompts: one prompt or several; "" is no prompt at all.
            seed: of the first picture of each prompt, the next ones count up; or a list, one a picture of a prompt;
                drawn if None. A seed means one picture, whatever it is generated together with.
            images: pictures a prompt.
            noise: use this standard normal noise `[prompts * images, h, w, C]` instead of seeds.
            keep_steps: also decode the state after each flow block.
            batch_size: pictures sampled at once.
            progress: show progress bars; None shows them on a terminal only.
            settings: overrides of `GenerationSettings`.

        Raises:
            StarflowError: a setting is out of range, the noise has the wrong shape, or the result is not finite.
        """
        merged = GenerationSettings.from_dict({**self.settings.to_dict(), **settings})
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise StarflowError("there is no prompt")
        seeds = self._seeds(seed, images, noise)
        requests = [(prompt, each) for prompt in prompts for each in seeds]
        shape = self.latent_shape(merged.size)
        if noise is None:
            noise = draw_noise([each for _, each in requests], shape)
        elif noise.shape != (len(requests), *shape):
            raise StarflowError(f"noise has shape {list(noise.shape)}; needed is {[len(requests), *shape]}")

        stats = GenerationStats()
        with stats.phase("text"):
            texts = self.encode_prompts([*prompts, ""])
            mx.eval(texts)
        self._done_with("_text")
        of_prompt = {prompt: texts[index] for index, prompt in enumerate(prompts)}
        text = mx.stack([of_prompt[prompt] for prompt, _ in requests])
        parts = [slice(start, start + batch_size) for start in range(0, len(requests), batch_size)]

        def sampled(part: slice) -> list[mx.array]:
            return self._sample(
                noise[part], text[part], texts[-1:], merged, stats, keep_steps, jacobi_settings, progress
            )

        hide_batches = progress_off(progress) if len(parts) > 1 else True
        states = [sampled(part) for part in tqdm(parts, desc="batches", disable=hide_batches)]
        self._done_with("flow")
        with stats.phase("decode"):
            decoded = [[self._decode(state) for state in batch] for batch in states]
        self._done_with("vae")
        pictures = [picture for batch in decoded for picture in batch[-1]]
        steps = [list(images) for batch in decoded for images in zip(*batch, strict=True)] if keep_steps else []
        return GenerationResult(
            images=pictures,
            latents=mx.concatenate([batch[-1] for batch in states]),
            noise=noise,
            prompts=[prompt for prompt, _ in requests],
            seeds=[each for _, each in requests],
            steps=steps,
            metadata=[self._metadata([p], [s], merged, noise[i : i + 1]) for i, (p, s) in enumerate(requests)],
            settings=merged,
            stats=stats,
        )

    def _seeds(self, seed: int | Sequence[int] | None, images: int, noise: np.ndarray | None) -> list[int | None]:
        if images < 1:
            raise StarflowError(f"the number of images must be 1 or more, not {images}")
        if noise is not None:
            return [None] * images
        if seed is None:
            seed = draw_seed()
        return [seed + k for k in range(images)] if isinstance(seed, int) else list(seed)

    def _sample(
        self,
        noise: np.ndarray,
        text: mx.array,
        null_text: mx.array,
        settings: GenerationSettings,
        stats: GenerationStats,
        keep_steps: bool,
        jacobi_settings: JacobiSettings | None,
        progress: bool | None,
    ) -> list[mx.array]:
        """Noise -> latents; before them, if asked for, the states on the way: noise, and data after each block."""
        trace = SamplingTrace(keep_states=keep_steps)
        z = settings.temperature * mx.array(noise)
        with stats.phase("flow"):
            x = sample(
                self.flow,
                z,
                text,
                null_text,
                settings.guidance,
                settings.method,
                jacobi_settings=jacobi_settings,
                attn_temp=settings.attn_temp,
                progress=progress,
                trace=trace,
            )
            mx.eval(x)
        active = sum(not block.is_identity for block in self.flow.blocks)
        stats.count(trace.evaluations, active * x.size // self.config.blocks[0].in_channels)
        if settings.denoise:
            with stats.phase("denoise"):
                x = denoise(self.flow, x, text)
        return [z, *trace.states, x] if keep_steps else [x]

    def _decode(self, latents: mx.array) -> list[Image.Image]:
        # The flow speaks float32; the decoder its own precision.
        unscaled = self.vae.unscale(latents).astype(self.vae.decoder.conv_in.weight.dtype)
        # As many pictures at once as make up a large one; those that are larger, `decode` takes row by row.
        count = max(1, WHOLE_PIXELS // (latents.shape[1] * latents.shape[2] * self.vae_config.downscale**2))
        parts = [unscaled[start : start + count] for start in range(0, len(unscaled), count)]
        return [image for part in parts for image in to_images(np.array(self.vae.decode(part).astype(mx.float32)))]

    def _metadata(
        self, prompts: list[str], seeds: list[int | None], settings: GenerationSettings, noise: np.ndarray
    ) -> dict[str, Any]:
        """All that is needed to make pictures again: prompts times seeds, as `generate` takes them."""
        metadata = {"version": __version__, "model": self.name, "prompts": prompts, "seeds": seeds}
        if None in seeds:
            metadata["noise_sha256"] = digest(noise)
        return {**metadata, "settings": settings.to_dict()}

    def grid_metadata(self, result: GenerationResult) -> dict[str, Any]:
        """Metadata of a grid of all pictures of a result."""
        images = len(result.images) // len(dict.fromkeys(result.prompts))
        prompts, seeds = result.prompts[::images], result.seeds[:images]
        return self._metadata(prompts, seeds, result.settings, result.noise)


def load(name: str | Path = "demo", *, dtype: mx.Dtype | None = None, low_memory: bool | None = None) -> Pipeline:
    """Load a text-to-picture model: "demo", a model directory, or a Hub repository of one.

    Args:
        dtype: precision of the networks; by default float32 on a CPU and bfloat16 on a GPU.
        low_memory: hold one network at a time, for models that do not fit into memory together; None: if, by
            `memory.plan`, this one does not fit into this machine's.

    Raises:
        StarflowError: there is no such model, or its files are damaged or of another kind.
    """
    pipe = Pipeline(str(name), find_model(str(name)), dtype=dtype, low_memory=bool(low_memory))
    if low_memory is None:
        pipe.low_memory = plan(pipe.directory, size=pipe.settings.size, dtype=dtype).peak() > available()
    if not pipe.low_memory:
        _ = pipe.flow, pipe.text_encoder, pipe.vae
    return pipe
