"""Inpainting by annealed Langevin dynamics: part of an image stays, the rest follows the flow's exact score.

A state is noisy data x. One step goes a share s of the way to where a score step (Tweedie's formula) would lead, and
adds noise,

    x' = x + s sigma^2 d log p(x | prompt)/dx + sqrt(2 s t) sigma e,   e ~ N(0, 1),

where sigma is the flow's training noise (arXiv 1907.05600, with the score of one noise level; a density with that
noise added curves by no more than 1 / sigma^2, so that steps up to s = 1 are stable). At temperature t = 1 these are
Langevin dynamics, which sample; t falls to 0 over the first two thirds of the steps, and the rest go uphill. Before
each step what is kept is put in place, with fresh noise; along its edge, by a share that grows with the distance. The
first state is a sample of the model. A step is one vector-Jacobian product through the flow, in parallel over all
tokens: no step inverts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.editing.maps import Inversion, cleaned, noise_to_tokens, previews
from mlx_starflow.editing.masks import check_mask, fill, kept_share, read_mask, soft_mask
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.nll import LEVELS, check_nats, is_dequantized, token_nats, training_noise, with_noise
from mlx_starflow.likelihood.protocol import ImageModel, Prompt
from mlx_starflow.media.given import ImageSource, open_image
from mlx_starflow.media.images import save_images, to_images
from mlx_starflow.media.noise import check_seeds, draw_noise
from mlx_starflow.media.pixels import crop_image, scale_pixels
from mlx_starflow.models.flow import Flow
from mlx_starflow.planning.limits import check_count, check_held
from mlx_starflow.sampling import GuidedFlow, denoise
from mlx_starflow.sampling.methods import Method
from mlx_starflow.sampling.progress import Callback, Watch, watch

COOLING = 2 / 3
"""Share of the steps over which the temperature falls from 1 to 0."""


@dataclass(frozen=True)
class Inpainting:
    """Images whose free part was painted, one a seed.

    Attributes:
        images: further than the feather from the mask their pixels are those of the original.
        data: of the images, without noise, `[B, ...]`.
        nll: of the first state and of the last one of each round, exact, in nats per dimension, `[1 + rounds, B]`.
        metadata: how each was made, for `media.images.save_image`.
    """

    images: list[Image.Image]
    data: np.ndarray
    nll: np.ndarray
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: str | Path) -> list[Path]:
        """Write the images with their metadata, see `media.images.save_images`. Raises StarflowError."""
        return save_images(self.images, path, self.metadata)


@checked
def inpaint(
    model: ImageModel,
    image: ImageSource,
    mask: ImageSource,
    prompt: Prompt = "",
    *,
    steps: int = 10,
    rounds: int = 3,
    strength: float = 0.5,
    feather: int | None = None,
    images: int = 1,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    method: Method | None = None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> Inpainting:
    """Paint the free part of an image anew.

    Args:
        model: a pipeline, or another model.
        image: a file, a PIL image or an array, see `media.given`; it is cut about its middle and resized to `size`, and
            the mask with it.
        mask: a file, a PIL image or an array of the image's size, white (True) where it is free, or such a rectangle,
            "x,y,w,h", see `masks.read_mask`.
        prompt: of the whole image; "" is none.
        steps: in each round; each costs about as much as cleaning a sample.
        rounds: after each, the image is encoded anew, so that the autoencoder's latents of the kept part know what
            is beside it. One is enough for a TarFlow, which has no autoencoder.
        strength: s of the steps, above 0 and at most 1.
        feather: pixels about the mask over which what is kept gives way to what is painted; 0 is a hard edge. By
            default a sixteenth of the shorter side.
        images: images of seeds of their own.
        seed: of the first image; the others count up. A seed means one image.
        size: (width, height) in pixels; the model's own by default.
        method: how the sample that it starts from is made, see `sample`; by default as the model's sampling plan says,
            and one token after another if it has none.
        progress: a `Progress`, or whether to show a progress bar; None shows it on a terminal only.
        callback: is called with the `Progress`, which says how far this is and can cancel it.

    Raises:
        StarflowError: a setting is out of range, the mask does not fit, or a likelihood is not finite.
    """
    width, height = size or model.size
    feather = min(width, height) // 16 if feather is None else feather
    _check(steps, rounds, strength, feather, images, seed)
    progress = watch(progress, callback)
    inversion = Inversion(model.inversion(method), progress)
    image = open_image(image)
    mask = read_mask(mask, image.size)
    check_held(images, 32 * width * height)  # each is painted in float32, and has data and noise of its own
    free = np.asarray(crop_image(mask, width, height)) > 127
    check_mask(free, "(resized to the model's pictures)")
    alpha = soft_mask(free, feather)
    original = scale_pixels(np.asarray(model.fit(image, size)))
    painted = np.repeat(fill(original, free)[None], images, axis=0)
    seeds = range(seed, seed + images)
    condition, state, nll = None, None, []
    counting = progress.counting("inpainting", steps * rounds, "step")
    with counting as counter, progress.previewing(previews(model)):
        for number in range(rounds):
            kept = np.concatenate([model.encode_images(each[None]) for each in painted.astype(np.float32)])
            model.release("vae")
            if number == 0:
                condition = model.conditions([prompt] * images, kept.shape)
                model.release("text_encoder")
            flow, held = model.dense_flow(), kept_share(free, alpha, kept.shape[-3:-1])
            dynamics = Langevin(flow, condition, held, seeds, strength)
            if state is None:
                state = _sample(flow, condition, kept.shape, seeds, model.temperature, inversion)
                nll.append(dynamics.nll(dynamics.hold(kept, state, 0)))
            for step in range(number * steps, (number + 1) * steps):
                progress.check()
                temperature = max(0.0, 1 - step / (COOLING * steps * rounds))
                state = dynamics.step(dynamics.hold(kept, state, step), step, temperature)
                counter.state = partial(mx.array, state)
                counter.advance(1)
            state = dynamics.hold(kept, state, steps * rounds)
            nll.append(dynamics.nll(state))
            data = dynamics.clean(kept, state, progress)
            del flow, dynamics
            model.release("flow")
            decoded = np.concatenate([model.decode_images(each[None]) for each in data])
            painted = original + alpha[..., None] * (np.clip(decoded, -1, 1) - original)
    about = {
        **model.origin(),
        "made_by": "edit inpaint",
        "prompts": [str(prompt)],
        "size": (width, height),
        "steps": steps,
        "rounds": rounds,
        "strength": strength,
        "feather": feather,
    }
    metadata = [{**about, "seeds": [each]} for each in seeds]
    return Inpainting(to_images(painted), data, np.stack(nll), metadata)


class Langevin:
    """Langevin dynamics of noisy data of which a part is held; a batch is as many independent chains.

    Attributes:
        flow, condition: what they follow.
        held: how far each cell of the data is held, `[rows, columns, 1]`: 1 stays, 0 is free.
        seeds: of the chains.
        strength: s of a step.
        noise_std: sigma, the standard deviation of the training noise.
    """

    def __init__(self, flow: Flow, condition: mx.array | None, held: np.ndarray, seeds: Sequence[int], strength: float):
        """`held` `[rows, columns]` is `masks.kept_share`."""
        self.flow, self.condition, self.held = flow, condition, mx.array(held)[..., None]
        self.seeds, self.strength = seeds, strength
        # Uniform noise within a level of -1..1, where the flow knows such noise.
        uniform = 2 / LEVELS / math.sqrt(12)
        self.noise_std = uniform if is_dequantized(flow) else float(np.asarray(flow.noise_std))

    def hold(self, kept: np.ndarray, x: mx.array, step: int) -> mx.array:
        """Noisy data x `[B, ...]` with the `kept` data in place, under the training noise of this step."""
        noisy = mx.array(with_noise(self.flow, kept, 2 * step, numbers=self.seeds))
        return self.held * noisy + (1 - self.held) * x

    def step(self, x: mx.array, step: int, temperature: float) -> mx.array:
        """One step from noisy data `[B, ...]`, whose noise follows from the chain's seed and the step's number."""
        towards = denoise(self.flow, x, self.condition, noise_std=self.noise_std) - x
        spread = math.sqrt(2 * self.strength * temperature) * self.noise_std
        noise = mx.array(training_noise(len(self.seeds), x.shape[1:], 2 * step + 1, numbers=self.seeds))
        x = x + self.strength * towards + spread * noise
        mx.eval(x)
        return x

    def nll(self, x: mx.array) -> np.ndarray:
        """Exact NLL of noisy data, nats per dimension, `[B]`. Raises StarflowError if it is not finite."""
        nats = token_nats(self.flow, x, self.condition)
        check_nats(nats)
        return nats.sum(axis=(1, 2)) / x[0].size

    def clean(self, kept: np.ndarray, x: mx.array, progress: Watch) -> np.ndarray:
        """Data without noise `[B, ...]`: x cleaned, with the `kept` data in place."""
        clean = cleaned(self.flow, x, self.condition, progress)
        return np.array(self.held * mx.array(kept) + (1 - self.held) * clean)


def _sample(
    flow: Flow,
    condition: mx.array | None,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    temperature: float,
    inversion: Inversion,
) -> mx.array:
    """Samples of the flow as data `[B, ...]`, of `shape`."""
    z = temperature * draw_noise(seeds, flow.tokens(mx.zeros((1, *shape[1:]))).shape[1:])
    return flow.latents(noise_to_tokens(GuidedFlow(flow, shape, condition), mx.array(z), inversion), shape)


def _check(steps: int, rounds: int, strength: float, feather: int, images: int, seed: int) -> None:
    for name, value in {"steps": steps, "rounds": rounds, "images": images}.items():
        if value < 1:
            raise StarflowError(f"the number of {name} must be 1 or more, not {value}")
        check_count(value, name)
    check_count(steps * rounds, "steps")
    check_seeds([seed])
    if not 0 < strength <= 1:
        raise StarflowError(f"the strength of steps must be above 0 and at most 1, not {strength:g}")
    if feather < 0:
        raise StarflowError(f"the feather must be 0 pixels or more, not {feather}")
