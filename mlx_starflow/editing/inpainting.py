"""Inpainting by Metropolis-Hastings: part of an image stays, the rest follows the model.

A state is noisy data x whose kept tokens are those of the image. A proposal perturbs the noise z = f(x) under the
mask,

    z' = sqrt(1 - s^2) z + s e,   e ~ N(0, 1),

maps it back, and puts the kept tokens in place again (arXiv 2412.06329, 2506.06276). The perturbation leaves the prior
as it is: what it does to the likelihood of the free tokens is what the prior asks for already. So, of the likelihood
ratio, the Metropolis-Hastings ratio p(x') q(x | x') / (p(x) q(x' | x)) is the part of the kept tokens: how much better
they go with their new surroundings. That is exact for one block that reads the kept tokens all before or all after the
free ones, and a close approximation for several blocks, which mix tokens (docs/likelihood.md measures it). The whole
likelihood ratio would be right if the proposal were symmetric; it counts the free tokens twice, and its chains drift
to images that are more likely than samples are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.editing.maps import SEQUENTIAL, Inversion, cleaned, noise_to_tokens
from mlx_starflow.editing.masks import check_mask, fill, read_mask, token_mask
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.nll import noise_and_nats, with_noise
from mlx_starflow.likelihood.protocol import ImageModel, Prompt
from mlx_starflow.media.given import ImageSource, open_image
from mlx_starflow.media.images import save_images, to_images
from mlx_starflow.media.noise import check_seeds
from mlx_starflow.media.pixels import crop_image, scale_pixels
from mlx_starflow.models.flow import Flow
from mlx_starflow.planning.limits import check_count, check_held
from mlx_starflow.sampling import GuidedFlow
from mlx_starflow.sampling.methods import Method
from mlx_starflow.sampling.progress import Callback, Watch, watch

ACCEPT = ("kept", "whole")
"""Whose likelihood ratio decides: that of the kept tokens, or the whole one."""


@dataclass(frozen=True)
class Trace:
    """What Metropolis-Hastings did.

    Attributes:
        accepted: whether each step's proposal was taken, `[steps, B]`.
        nll: of each state, in nats per dimension, `[1 + steps, B]`.
    """

    accepted: np.ndarray
    nll: np.ndarray

    @property
    def rate(self) -> float:
        """Share of the proposals that were accepted."""
        return float(self.accepted.mean())

    @classmethod
    def joined(cls, traces: Sequence[Trace]) -> Trace:
        """Of chains one after the other: each begins where the one before it ended."""
        accepted = np.concatenate([trace.accepted for trace in traces])
        return cls(accepted, np.concatenate([traces[0].nll[:1], *(trace.nll[1:] for trace in traces)]))


@dataclass(frozen=True)
class Inpainting:
    """Images whose free part was painted, one a chain.

    Attributes:
        images: outside the mask their pixels are those of the original.
        data: of the images, without noise, `[B, ...]`.
        trace: what the chains did.
        metadata: how each was made, for `media.images.save_image`.
    """

    images: list[Image.Image]
    data: np.ndarray
    trace: Trace
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
    steps: int = 20,
    rounds: int = 3,
    strength: float = 0.5,
    accept: str = "kept",
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
        steps: of Metropolis-Hastings in each round; each costs about as much as generating an image.
        rounds: after each, the image is encoded anew, so that the autoencoder's latents of the kept part know what
            is beside it. One is enough for a TarFlow, which has no autoencoder.
        strength: s of the proposals, above 0 and at most 1, which forgets the noise under the mask at each step.
        accept: "kept" or "whole": the tokens whose likelihood ratio decides, see above.
        images: chains, each with an image of its own.
        seed: of the first chain; the others count up. A seed means one image.
        size: (width, height) in pixels; the model's own by default.
        method: how the noise is made an image again, see `sample`; by default as the model's sampling plan says, and
            one token after another if it has none.
        progress: a `Progress`, or whether to show a progress bar; None shows it on a terminal only.
        callback: is called with the `Progress`, which says how far this is and can cancel it.

    Raises:
        StarflowError: a setting is out of range, the mask does not fit, or a likelihood is not finite.
    """
    _check(steps, rounds, strength, accept, images, seed)
    progress = watch(progress, callback)
    inversion = Inversion(model.inversion(method), progress)
    image = open_image(image)
    mask = read_mask(mask, image.size)
    width, height = size or model.size
    check_held(images, 32 * width * height)  # each is painted in float32, and has data and noise of its own
    free_pixels = np.asarray(crop_image(mask, width, height)) > 127
    check_mask(free_pixels, "(resized to the model's pictures)")
    original = scale_pixels(np.asarray(model.fit(image, size)))
    painted = np.repeat(fill(original, free_pixels)[None], images, axis=0)
    seeds = range(seed, seed + images)
    rngs = [np.random.Generator(np.random.Philox(each)) for each in seeds]
    condition, noisy, traces = None, None, []
    with progress.counting("inpainting", steps * rounds, "step") as counter:
        for number in range(rounds):
            kept = np.concatenate([model.encode_images(each[None]) for each in painted.astype(np.float32)])
            model.release("vae")
            if number == 0:
                condition = model.conditions([prompt] * images, kept.shape)
                model.release("text_encoder")
            free = token_mask(free_pixels, model.grid(kept.shape[1:])).reshape(-1)
            chain = Chain(model.dense_flow(), kept.shape, condition, free, inversion)
            noisy, data, trace = _round(chain, kept, noisy, seeds, rngs, steps, strength, accept, counter.advance)
            traces.append(trace)
            del chain
            model.release("flow")
            decoded = np.concatenate([model.decode_images(each[None]) for each in data])
            painted = np.where(free_pixels[:, :, None], np.clip(decoded, -1, 1), original)
    about = {
        **model.origin(),
        "made_by": "edit inpaint",
        "prompts": [str(prompt)],
        "size": (width, height),
        "steps": steps,
        "rounds": rounds,
        "strength": strength,
        "accept": accept,
    }
    metadata = [{**about, "seeds": [each]} for each in seeds]
    return Inpainting(to_images(painted), data, Trace.joined(traces), metadata)


def _round(
    chain: Chain,
    kept: np.ndarray,
    noisy: mx.array | None,
    seeds: Sequence[int],
    rngs: Sequence[np.random.Generator],
    steps: int,
    strength: float,
    accept: str,
    advance: Callable[[int], object],
) -> tuple[mx.array, np.ndarray, Trace]:
    """One round over data without noise, `[B, ...]`: where its noisy tokens end, the data cleaned, and the trace.

    `noisy` is where the round before ended; its free tokens go on.
    """
    flow = chain.flow
    fresh = flow.tokens(mx.array(with_noise(flow, kept, 0, numbers=seeds)))
    start = chain.start(fresh, rngs) if noisy is None else chain.with_kept(fresh, noisy)
    end, trace = chain.run(start, rngs, steps, strength, accept, advance)
    clean = flow.tokens(cleaned(flow, flow.latents(end, kept.shape), chain.condition, chain.inversion.progress))
    tokens = chain.with_kept(flow.tokens(mx.array(kept)), clean)
    return end, np.array(flow.latents(tokens, kept.shape)), trace


class Chain:
    """Metropolis-Hastings over the free tokens of noisy data; a batch is as many independent chains."""

    def __init__(
        self,
        flow: Flow,
        shape: tuple[int, ...],
        condition: mx.array | None,
        free: np.ndarray,
        inversion: Inversion = SEQUENTIAL,
    ):
        """`shape` `[B, ...]` is the data's, `free` `[N]` says which tokens change."""
        self.inversion = inversion
        self.flow, self.shape, self.condition = flow, shape, condition
        self.free, self.mask = free, mx.array(free)[None, :, None]
        self.guided = GuidedFlow(flow, shape, condition)

    def with_kept(self, kept: mx.array, tokens: mx.array) -> mx.array:
        """Tokens `[B, N, C]` whose kept ones are those of `kept`."""
        return mx.where(self.mask, tokens, kept)

    def start(self, kept: mx.array, rngs: Sequence[np.random.Generator]) -> mx.array:
        """A first state: noise in place of the free tokens, mapped to z, redrawn there, and mapped back."""
        z, _ = self._forward(self.with_kept(kept, self._normal(rngs, kept.shape)))
        z = mx.where(self.mask, self._normal(rngs, z.shape), z)
        return self.with_kept(kept, noise_to_tokens(self.guided, z, self.inversion))

    def run(
        self,
        tokens: mx.array,
        rngs: Sequence[np.random.Generator],
        steps: int,
        strength: float,
        accept: str = "kept",
        advance: Callable[[int], object] = lambda steps: None,
    ) -> tuple[mx.array, Trace]:
        """So many steps from tokens `[B, N, C]`; the generators are those of the chains."""
        decisive = ~self.free if accept == "kept" else np.ones_like(self.free)
        z, nats = self._forward(tokens)
        nll, accepted = [nats.sum(axis=1)], []
        for _ in range(steps):
            moved = math.sqrt(1 - strength**2) * z + strength * self._normal(rngs, z.shape)
            moved = noise_to_tokens(self.guided, mx.where(self.mask, moved, z), self.inversion)
            proposal = self.with_kept(tokens, moved)
            new_z, new_nats = self._forward(proposal)
            log_ratio = (nats - new_nats)[:, decisive].sum(axis=1)
            take = np.log([rng.random() for rng in rngs]) < log_ratio
            chosen = mx.array(take)[:, None, None]
            tokens, z = mx.where(chosen, proposal, tokens), mx.where(chosen, new_z, z)
            nats = np.where(take[:, None], new_nats, nats)
            mx.eval(tokens, z)
            nll.append(nats.sum(axis=1))
            accepted.append(take)
            advance(1)
        return tokens, Trace(np.array(accepted).reshape(steps, -1), np.array(nll) / np.prod(self.shape[1:]))

    def _forward(self, tokens: mx.array) -> tuple[mx.array, np.ndarray]:
        """Standard normal tokens, and nats of each token, `[B, N]`."""
        z, nats = noise_and_nats(self.flow, self.flow.latents(tokens, self.shape), self.condition)
        if not np.isfinite(nats).all():
            raise StarflowError("the likelihood is not finite: try a smaller strength, or float32")
        return z, nats.sum(axis=1)

    @staticmethod
    def _normal(rngs: Sequence[np.random.Generator], shape: tuple[int, ...]) -> mx.array:
        return mx.array(np.stack([rng.standard_normal(shape[1:], np.float32) for rng in rngs]))


def _check(steps: int, rounds: int, strength: float, accept: str, images: int, seed: int) -> None:
    for name, value in {"steps": steps, "rounds": rounds, "images": images}.items():
        if value < 1:
            raise StarflowError(f"the number of {name} must be 1 or more, not {value}")
        check_count(value, name)
    check_count(steps * rounds, "steps")
    check_seeds([seed])
    if not 0 < strength <= 1:
        raise StarflowError(f"the strength of proposals must be above 0 and at most 1, not {strength:g}")
    if accept not in ACCEPT:
        raise StarflowError(f"unknown rule {accept!r}; proposals are accepted by {' or '.join(ACCEPT)}")
