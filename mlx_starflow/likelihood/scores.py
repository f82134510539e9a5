"""Scores of images and videos: exact NLL with its error, and where in the image, or when, it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.nll import (
    at_once,
    bits_per_dimension,
    drawn_nats,
    is_dequantized,
    standard_error,
    unit_of,
)
from mlx_starflow.likelihood.protocol import ImageModel, Prompts, one_or_several
from mlx_starflow.media.given import Images, one_or_many
from mlx_starflow.sampling.progress import Callback, Watch, watch


@dataclass(frozen=True)
class Score:
    """Exact likelihood of one image, or video, with the noise that the flow was trained with.

    Attributes:
        nats: -log p in nats of each draw of the noise, part (the prior, then the flow's blocks) and token, tokens in
            the image's order: `[draws, 1 + blocks, *grid]`, with the grid (rows, columns) or, of a video, (latent
            frames, rows, columns).
        dimensions: of the data.
        dequantized: the flow models pixels made continuous, so that bits per dimension mean something.
    """

    nats: np.ndarray
    dimensions: int
    dequantized: bool = False

    @property
    def draws(self) -> np.ndarray:
        """NLL of each draw of the noise, `[draws]`, in nats per dimension."""
        return self.nats.reshape(len(self.nats), -1).sum(axis=1) / self.dimensions

    @property
    def nll(self) -> float:
        """Nats per dimension, mean over draws."""
        return float(self.draws.mean())

    @property
    def standard_error(self) -> float:
        """Of `nll`, from the spread of the draws; NaN for a single one."""
        return standard_error(self.draws)

    @property
    def surprise(self) -> np.ndarray:
        """Nats of each token, `[*grid]`, mean over draws. They sum to `nll * dimensions`."""
        return self.nats.mean(axis=0).sum(axis=0)

    @property
    def prior(self) -> float:
        """The prior's part of `nll`."""
        return float(self.nats[:, 0].mean(axis=0).sum() / self.dimensions)

    @property
    def frames(self) -> list[Score]:
        """Of a video, -log p of each latent frame given those before it; none of an image.

        The parts of `nats` that a frame has are that exactly: z and the log-determinants of a frame depend on it and
        the frames before it alone, since the shallow blocks read each frame by itself and the deep block is causal in
        time. So the mean of the frames' `nll` is the video's.
        """
        if self.nats.ndim < 5:
            return []
        count = self.nats.shape[2]
        return [Score(self.nats[:, :, frame], self.dimensions // count) for frame in range(count)]

    @property
    def bits(self) -> float | None:
        """Bits per pixel and channel, of a dequantized pixel model; None for any other."""
        return bits_per_dimension(self.nll) if self.dequantized else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: nats per dimension, and the surprise map in nats per token."""
        values = {
            "nll": self.nll,
            "standard_error": None if len(self.nats) < 2 else self.standard_error,
            "draws": len(self.nats),
            "dimensions": self.dimensions,
            "prior": self.prior,
            "surprise": self.surprise.tolist(),
        }
        if frames := self.frames:
            own = ("nll", "standard_error", "prior")
            values["frames"] = [{key: each[key] for key in own} for each in (frame.to_dict() for frame in frames)]
        return values | ({"bits_per_pixel_dimension": self.bits} if self.dequantized else {})


@checked
def score(
    model: ImageModel,
    images: Images,
    prompts: Prompts = "",
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    size: tuple[int, int] | None = None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> list[Score]:
    """Score images: exact likelihood under the model, given a prompt or none.

    Args:
        model: a pipeline, or another model.
        images: one or many, see `media.given`; each is cut about its middle and resized to `size`. For a model of
            videos also videos, of any lengths up to the model's: the frames of each, or its file.
        prompts: one for all or one an image; "" is no prompt. For a TarFlow: numbers of classes.
        draws: of the training noise, which is added to the image's latents; 1 or more.
        seed: of the noise. An image's noise follows from its number in `images`, the draw and the seed alone.
        batch_size: images, or latent frames of videos, at once.
        size: (width, height) in pixels; the model's own by default.
        progress: a `Progress`, or whether to show a progress bar; None shows it on a terminal only.
        callback: is called with the `Progress`, which says how far this is and can cancel it.

    Raises:
        StarflowError: there are no images, or not as many prompts, or the likelihood is not finite.
    """
    progress = watch(progress, callback)
    data = model.to_data_each(progress.each("reading", one_or_many(images), "picture"), size)
    model.release("vae")
    scores = score_data(model, data, prompts, draws=draws, seed=seed, batch_size=batch_size, progress=progress)
    model.release("flow")
    return scores


def score_data(
    model: ImageModel,
    data: np.ndarray | Sequence[np.ndarray],
    prompts: Prompts = "",
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    progress: Watch = False,
) -> list[Score]:
    """`score` of data `[B, ...]` without noise, such as `ImageModel.to_data` gives or latents of a sample.

    Also of a list of data `[...]` of different shapes.
    """
    prompts = [str(prompts)] * len(data) if isinstance(prompts, str | int) else one_or_several(prompts)
    if len(prompts) != len(data):
        raise StarflowError(f"there are {len(prompts)} prompts for {len(data)} pictures; give one, or one a picture")
    # Data of one shape are scored together.
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, each in enumerate(data):
        shapes.setdefault(each.shape, []).append(number)
    texts = [model.conditions([prompts[n] for n in own], (len(own), *shape)) for shape, own in shapes.items()]
    model.release("text_encoder")
    scores: dict[int, Score] = {}
    flow = model.dense_flow()
    unit = unit_of(data[0][None].shape)
    with watch(progress).counting("scoring", len(data), unit) as counter:
        for (shape, own), text in zip(shapes.items(), texts, strict=True):
            grid, dimensions = model.grid(shape), int(np.prod(shape))
            count = at_once(batch_size, (1, *shape))
            for part in _parts(len(own), count):
                nats = drawn_nats(
                    flow,
                    np.stack([data[number] for number in own[part]]),
                    None if text is None else text[part],
                    draws=draws,
                    seed=seed,
                    batch_size=count,
                    numbers=own[part],
                )
                for number, each in zip(own[part], nats.swapaxes(0, 1), strict=True):
                    each = each.reshape(*each.shape[:2], *grid)
                    scores[number] = Score(each, dimensions, is_dequantized(flow))
                counter.advance(part.stop - part.start)
    return [scores[number] for number in range(len(data))]


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
