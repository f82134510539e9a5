"""The best of several samples for each image that was asked for, by the flow's own likelihoods."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood import ImageModel
from mlx_starflow.likelihood.prompts import log_likelihoods
from mlx_starflow.pipelines.results import GeneratedImage, GenerationResult
from mlx_starflow.sampling.progress import Watch

DRAWS = 4
"""Of the training noise, for the likelihoods that the best is chosen by."""


@dataclass(frozen=True)
class BestOf:
    """The best of several samples for each image that was asked for.

    Attributes:
        result: what `ImagePipeline.generate` gives, with the best samples alone.
        fits: log p(x | prompt) - log p(x) in nats of all candidates, `[images, candidates]`.
        scores: what they were chosen by, log p(x | prompt) - weight * log p(x), `[images, candidates]`.
        chosen: number of the candidate that was kept, `[images]`.
    """

    result: GenerationResult
    fits: np.ndarray
    scores: np.ndarray
    chosen: np.ndarray


def choose_best(
    model: ImageModel,
    result: GenerationResult,
    candidates: int,
    *,
    draws: int = DRAWS,
    weight: float = 0.5,
    progress: Watch = False,
) -> BestOf:
    """Keep one of every so many samples that follow each other in a result; see `ImagePipeline.best_of`.

    Args:
        model: what the samples are of.
        result: `candidates` samples for each image, with the prompt that they share.
        draws: of the training noise; all candidates see the same.
        weight: of log p(x).
        progress: is told of the scoring, and can end it.

    Raises:
        StarflowError: a likelihood is not finite.
    """
    latents = np.array(result.latents, np.float32)
    nats = np.empty((len(latents), 2))
    for prompt in dict.fromkeys(result.prompts):
        mine = [number for number, each in enumerate(result.prompts) if each == prompt]
        nats[mine] = _nats(model, latents[mine], prompt, draws, progress)
    prompted, unprompted = nats.reshape(-1, candidates, 2).transpose(2, 0, 1)
    scores = prompted - weight * unprompted
    chosen = scores.argmax(axis=1)
    kept = np.arange(len(chosen)) * candidates + chosen
    certificates = result.stats.certificates
    best = replace(
        result,
        stats=replace(result.stats, certificates=[certificates[i] for i in kept] if certificates else []),
        images=[result.images[i] for i in kept],
        latents=result.latents[mx.array(kept)],
        noise=result.noise[kept],
        prompts=[result.prompts[i] for i in kept],
        seeds=[result.seeds[i] for i in kept],
        steps=[result.steps[i] for i in kept] if result.steps else [],
        metadata=[result.metadata[i] for i in kept],
    )
    return BestOf(best, prompted - unprompted, scores, chosen)


def best_of_each(
    model: ImageModel,
    made: Generator[GeneratedImage, None, None],
    candidates: int,
    *,
    weight: float = 0.5,
    progress: Watch = False,
) -> Generator[GeneratedImage, None, None]:
    """`choose_best` of images that come one by one: of every so many the best, as soon as they are there."""
    while group := list(islice(made, candidates)):
        latents = np.stack([np.array(each.latents, np.float32) for each in group])
        prompted, unprompted = _nats(model, latents, group[0].prompt, DRAWS, progress).T
        best = int((prompted - weight * unprompted).argmax())
        model.release("flow")
        yield replace(group[best], fit=float(prompted[best] - unprompted[best]))


def check_candidates(prompts: Sequence[str], candidates: int) -> None:
    """Raise StarflowError unless one of so many can be the best for each prompt."""
    if candidates < 1:
        raise StarflowError(f"the best is chosen from 1 or more pictures, not {candidates}")
    if candidates > 1 and not all(prompt.strip() for prompt in prompts):
        raise StarflowError("an empty prompt fits every picture equally: give a prompt, or leave out the best-of")


def _nats(model: ImageModel, latents: np.ndarray, prompt: str, draws: int, progress: Watch) -> np.ndarray:
    """log p(x | prompt) and log p(x) of each, with the same training noise for all: `[B, 2]`."""
    numbers = [0] * len(latents)
    return log_likelihoods(model, latents, [prompt, ""], draws=draws, numbers=numbers, progress=progress).mean(axis=0)
