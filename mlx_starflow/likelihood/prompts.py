"""How well prompts fit pictures: likelihood ratios, Bayes' rule, and the best of several samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.nll import at_once, token_nats, with_noise
from mlx_starflow.media.noise import draw_seed
from mlx_starflow.pipelines.picture_flow import PictureFlow, picture_flow
from mlx_starflow.pipelines.pipeline import Pipeline
from mlx_starflow.pipelines.results import GenerationResult
from mlx_starflow.sampling.sampler import progress_off


def log_likelihoods(
    model: PictureFlow,
    data: np.ndarray,
    prompts: Sequence[str],
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    progress: bool | None = False,
) -> np.ndarray:
    """log p(x | prompt) in nats of every picture and prompt, for each draw of the noise: `[draws, B, prompts]`.

    All prompts see the same noise, so that the differences between them are exact for that noisy picture. `data` is
    without noise; the other arguments and errors are those of `likelihood.drawn_nats`.
    """
    if not len(data) or not prompts or draws < 1:
        raise StarflowError(
            "there is nothing to score: give at least one picture, one prompt and one draw of the noise"
        )
    conditions = model.conditions(prompts, data.shape)
    model.release("text")
    if conditions is None:
        raise StarflowError(f"{model.name} reads no prompts, so none fits better than another")
    pairs = np.stack(np.divmod(np.arange(len(data) * len(prompts)), len(prompts)))
    result = np.empty((draws, pairs.shape[1]))
    hide, batch_size = progress_off(progress), at_once(batch_size, data.shape)
    with tqdm(total=result.size, desc="scoring", unit="pair", disable=hide) as bar:
        for draw in range(draws):
            noisy = with_noise(model.flow, data, draw, seed, numbers)
            for start in range(0, pairs.shape[1], batch_size):
                picture, prompt = pairs[:, start : start + batch_size]
                nats = token_nats(model.flow, mx.array(noisy[picture]), conditions[mx.array(prompt)])
                result[draw, start : start + batch_size] = -nats.sum(axis=(1, 2))
                bar.update(len(picture))
    if not np.isfinite(result).all():
        raise StarflowError("the likelihood is not finite: the weights may be damaged; try float32")
    return result.reshape(draws, len(data), len(prompts))


def prompt_fit(
    model: PictureFlow | Pipeline,
    images: Iterable[Image.Image],
    prompts: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    **options: Any,
) -> np.ndarray:
    """log p(x | prompt) - log p(x), in nats: how much better a prompt explains a picture than no prompt does.

    That is the pointwise mutual information of picture and prompt under the model. It does not reward pictures for
    being simple, as the likelihood itself does.

    Args:
        model: a pipeline, or what `open_picture_flow` gives.
        images: pictures.
        prompts: for a TarFlow, numbers of classes.
        size: as in `score`.
        options: `draws`, `seed`, `batch_size` and `progress` of `log_likelihoods`.

    Returns:
        `[draws, pictures, prompts]`; average over draws.

    Raises:
        StarflowError: there is nothing to score, or the model reads no prompts.
    """
    model = picture_flow(model)
    data = model.data(images, size)
    model.release("vae")
    return fit_of_data(model, data, prompts, **options)


def fit_of_data(model: PictureFlow, data: np.ndarray, prompts: Sequence[str], **options: Any) -> np.ndarray:
    """`prompt_fit` of data `[B, ...]` without noise."""
    nats = log_likelihoods(model, data, [*prompts, ""], **options)
    return nats[:, :, :-1] - nats[:, :, -1:]


@dataclass(frozen=True)
class Classification:
    """Which label pictures have, by Bayes' rule.

    Attributes:
        labels: what there was to choose from.
        log_likelihood: log p(x | label) in nats, mean over draws of the noise, `[B, labels]`.
        posterior: p(label | x), `[B, labels]`; rows sum to 1.
    """

    labels: list[str]
    log_likelihood: np.ndarray
    posterior: np.ndarray

    @property
    def best(self) -> list[str]:
        """The most probable label of each picture."""
        return [self.labels[index] for index in self.posterior.argmax(axis=1)]

    @property
    def margin(self) -> np.ndarray:
        """Nats by which the best label is ahead of the second, `[B]`; infinite for a single label."""
        if len(self.labels) < 2:
            return np.full(len(self.posterior), np.inf)
        ordered = np.sort(self.log_likelihood, axis=1)
        return ordered[:, -1] - ordered[:, -2]


def classify(
    model: PictureFlow | Pipeline,
    images: Iterable[Image.Image],
    labels: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    **options: Any,
) -> Classification:
    """Bayes' rule with the flow as p(x | label), every label being as probable beforehand.

    log p(x | label) is averaged over draws of the noise. It is a sum over all of the picture's dimensions, so the
    posterior is nearly always close to 0 or 1: it says which label the model prefers, not how often it is right.

    Arguments and errors are those of `prompt_fit`.
    """
    labels = list(labels)
    if len(set(labels)) < len(labels):
        raise StarflowError("the labels must differ from one another")
    model = picture_flow(model)
    data = model.data(images, size)
    model.release("vae")
    nats = log_likelihoods(model, data, labels, **options).mean(axis=0)
    weights = np.exp(nats - nats.max(axis=1, keepdims=True))
    return Classification(labels, nats, weights / weights.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class BestOf:
    """The best of several samples for each picture that was asked for.

    Attributes:
        result: what `Pipeline.generate` gives, with the best samples alone.
        fits: log p(x | prompt) - log p(x) in nats of all candidates, `[pictures, candidates]`.
        scores: what they were chosen by, log p(x | prompt) - weight * log p(x), `[pictures, candidates]`.
        chosen: number of the candidate that was kept, `[pictures]`.
    """

    result: GenerationResult
    fits: np.ndarray
    scores: np.ndarray
    chosen: np.ndarray


def best_of(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    candidates: int,
    *,
    images: int = 1,
    seed: int | None = None,
    noise: np.ndarray | None = None,
    draws: int = 4,
    weight: float = 0.5,
    **options: Any,
) -> BestOf:
    """Sample `candidates` pictures for each one that is asked for and keep the one that its prompt fits best.

    Prompt fit alone, which is `weight` 1, also rises where log p(x) falls because a picture is not well made. So the
    unprompted likelihood counts half; docs/likelihood.md measures what that does.

    Args:
        pipe: the pipeline.
        prompts: as for `generate`.
        candidates: 1 or more.
        images: pictures a prompt.
        seed: of the first candidate; the others count up.
        noise: instead of seeds, `[prompts * images * candidates, h, w, C]`.
        draws: of the training noise, for the fit; all candidates see the same.
        weight: of log p(x), 0 (the most likely picture given the prompt) to 1 (the best prompt fit).
        options: the other arguments of `generate`.

    Raises:
        StarflowError: as `generate` does, or the prompt is empty: then nothing fits better.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if candidates < 1:
        raise StarflowError(f"the best is chosen from 1 or more pictures, not {candidates}")
    if not 0 <= weight <= 1:
        raise StarflowError(f"the weight of the unprompted likelihood is a number from 0 to 1, not {weight:g}")
    if candidates > 1 and not all(prompt.strip() for prompt in prompts):
        raise StarflowError("an empty prompt fits every picture equally: give a prompt, or leave out the best-of")
    if noise is None:
        seed = draw_seed() if seed is None else seed
        result = pipe.generate(prompts, seed=range(seed, seed + images * candidates), **options)
    else:
        result = pipe.generate(prompts, images=images * candidates, noise=noise, **options)
    model = picture_flow(pipe)
    latents = np.array(result.latents, np.float32)
    nats = np.empty((len(latents), 2))
    for prompt in dict.fromkeys(prompts):
        mine = [number for number, each in enumerate(result.prompts) if each == prompt]
        each = log_likelihoods(model, latents[mine], [prompt, ""], draws=draws, numbers=[0] * len(mine))
        nats[mine] = each.mean(axis=0)
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
