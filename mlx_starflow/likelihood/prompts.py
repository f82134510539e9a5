"""How well prompts fit images: likelihood ratios and Bayes' rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.conditions import ConditionedFlow
from mlx_starflow.likelihood.nll import at_once, check_draws, with_noise
from mlx_starflow.likelihood.protocol import ImageModel, Prompts, one_or_several
from mlx_starflow.media.given import Images, one_or_many
from mlx_starflow.sampling.progress import Callback, Watch, watch


def log_likelihoods(
    model: ImageModel,
    data: np.ndarray,
    prompts: Prompts,
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    progress: Watch = False,
) -> np.ndarray:
    """log p(x | prompt) in nats of every image and prompt, for each draw of the noise: `[draws, B, prompts]`.

    All prompts see the same noise, so that the differences between them are exact for that noisy image. `data` is
    without noise; the other arguments and errors are those of `likelihood.drawn_nats`.
    """
    prompts = one_or_several(prompts)
    if not len(data) or not prompts:
        raise StarflowError("there is nothing to score: give at least one picture and one prompt")
    check_draws(draws)
    conditions = model.conditions(prompts, data.shape)
    model.release("text_encoder")
    if conditions is None:
        raise StarflowError(f"{model.name} reads no prompts, so none fits better than another")
    result = np.empty((draws, len(data), len(prompts)))
    flow = model.dense_flow()
    batch_size = at_once(batch_size, data.shape)
    with watch(progress).counting("scoring", result.size, "pair") as counter:
        conditioned = ConditionedFlow(flow, conditions, data.shape)
        for draw in range(draws):
            noisy = with_noise(flow, data, draw, seed, numbers)
            for start in range(0, len(data), batch_size):
                part = slice(start, start + batch_size)
                result[draw, part] = -conditioned.nats(mx.array(noisy[part]), batch_size)
                counter.advance(result[draw, part].size)
    return result


@checked
def prompt_fit(
    model: ImageModel,
    images: Images,
    prompts: Prompts,
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    size: tuple[int, int] | None = None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> np.ndarray:
    """log p(x | prompt) - log p(x), in nats: how much better a prompt explains an image than no prompt does.

    That is the pointwise mutual information of image and prompt under the model. It does not reward images for
    being simple, as the likelihood itself does.

    Args:
        prompts: for a TarFlow, numbers of classes.

    The other arguments are those of `score`.

    Returns:
        `[draws, images, prompts]`; average over draws.

    Raises:
        StarflowError: there is nothing to score, or the model reads no prompts.
    """
    progress = watch(progress, callback)
    data = model.to_data(progress.each("reading", one_or_many(images), "picture"), size)
    model.release("vae")
    nats = log_likelihoods(
        model, data, [*one_or_several(prompts), ""], draws=draws, seed=seed, batch_size=batch_size, progress=progress
    )
    model.release("flow")
    return nats[:, :, :-1] - nats[:, :, -1:]


@dataclass(frozen=True)
class Classification:
    """Which label images have, by Bayes' rule.

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
        """The most probable label of each image."""
        return [self.labels[index] for index in self.posterior.argmax(axis=1)]

    @property
    def margin(self) -> np.ndarray:
        """Nats by which the best label is ahead of the second, `[B]`; infinite for a single label."""
        if len(self.labels) < 2:
            return np.full(len(self.posterior), np.inf)
        ordered = np.sort(self.log_likelihood, axis=1)
        return ordered[:, -1] - ordered[:, -2]


@checked
def classify(
    model: ImageModel,
    images: Images,
    labels: Prompts,
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    size: tuple[int, int] | None = None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> Classification:
    """Bayes' rule with the flow as p(x | label), every label being as probable beforehand.

    log p(x | label) is averaged over draws of the noise. It is a sum over all of the image's dimensions, so the
    posterior is nearly always close to 0 or 1: it says which label the model prefers, not how often it is right.

    Arguments and errors are those of `score` and `prompt_fit`.
    """
    labels = one_or_several(labels)
    if len(set(labels)) < len(labels):
        raise StarflowError("the labels must differ from one another")
    progress = watch(progress, callback)
    data = model.to_data(progress.each("reading", one_or_many(images), "picture"), size)
    model.release("vae")
    nats = log_likelihoods(model, data, labels, draws=draws, seed=seed, batch_size=batch_size, progress=progress).mean(
        axis=0
    )
    model.release("flow")
    weights = np.exp(nats - nats.max(axis=1, keepdims=True))
    return Classification(labels, nats, weights / weights.sum(axis=1, keepdims=True))
