"""What fine-tuning trains on and is measured by: a latent cache in two parts, and what anchors it to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_starflow.likelihood import Nll, exact_nll
from mlx_starflow.likelihood.nll import HALF_LOG_2PI
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.sampling import sample
from mlx_starflow.sampling.progress import Watch
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.cache.reading import CachedLatents, LatentCache
from mlx_starflow.training.finetuning.adapters import dropout_key
from mlx_starflow.training.finetuning.anchor import anchor_kl
from mlx_starflow.training.loop.objective import Batch, Metrics, batch_loss


@dataclass
class AnchorImages:
    """Images of a cache, all or those with the numbers `subset`, that the tuned flow is to see as the base does."""

    cache: LatentCache
    subset: np.ndarray | None = None

    def batch(self, count: int, rng: np.random.Generator, noise_std: float) -> dict[str, np.ndarray]:
        """`anchor_x`, latents with noise, and `anchor_text`; of one bucket."""
        cache = self.cache
        images = np.arange(len(cache)) if self.subset is None else self.subset
        bucket = cache.buckets[rng.choice(images)]
        chosen = rng.choice(images[cache.buckets[images] == bucket], count)
        draw, noise = rng.standard_normal((2, count, *cache.shapes[bucket]), dtype=np.float32)
        captions = [cache.captions[index][0] for index in chosen]
        latents = cache.latents(chosen, rng.integers(cache.views, size=count), draw)
        return {"anchor_x": latents + noise_std * noise, "anchor_text": cache.text(captions, cache.ratios[bucket])}


@dataclass
class AnchorSamples:
    """Samples of the base itself, `[N, H, W, C]` as it draws them (with the noise it models), and their text."""

    x: np.ndarray
    text: np.ndarray

    @classmethod
    def draw(
        cls, flow: STARFlow, cache: LatentCache, images: np.ndarray, count: int, seed: int, progress: Watch = False
    ) -> AnchorSamples:
        """Sample, without guidance, for captions of some of these images, of the most frequent bucket."""
        rng = np.random.default_rng([seed, 2])
        buckets = cache.buckets[images]
        bucket = np.bincount(buckets).argmax()
        chosen = rng.choice(images[buckets == bucket], count)
        text = cache.text([cache.captions[index][0] for index in chosen], cache.ratios[bucket])
        z = rng.standard_normal((count, *cache.shapes[bucket]), dtype=np.float32)
        parts = []
        for start in range(0, count, 8):
            part = slice(start, start + 8)
            x = sample(flow, mx.array(z[part]), mx.array(text[part]), progress=progress)
            parts.append(np.array(x.astype(mx.float32)))
        return cls(np.concatenate(parts), text)

    def batch(self, count: int, rng: np.random.Generator, noise_std: float) -> dict[str, np.ndarray]:
        """See `AnchorImages.batch`."""
        chosen = rng.integers(len(self.x), size=count)
        return {"anchor_x": self.x[chosen], "anchor_text": self.text[chosen]}


class FinetuneData(CachedLatents):
    """Batches of some images of a cache, a share of each taken from an anchor.

    Args:
        cache: the images.
        subset: numbers of those to train on.
        noise_std: the flow's.
        anchor, share: what the anchor's part of a batch comes from, and how large it is.
        dropout: give a key for `dropout_key` too.
        parts: that a batch is computed in, each of which has its share of the anchor.
    """

    def __init__(
        self,
        cache: LatentCache,
        subset: np.ndarray,
        noise_std: float,
        anchor: AnchorImages | AnchorSamples | None = None,
        share: float = 0.0,
        dropout: bool = False,
        parts: int = 1,
    ):
        super().__init__(cache, subset)
        self.noise_std, self.anchor, self.share, self.dropout = noise_std, anchor, share, dropout
        self.parts = parts

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        """That of `CachedLatents`, and `anchor_x`, `anchor_text` and `dropout` as asked for."""
        arrays = super().batch(rng, config, progress)
        if self.anchor is not None:
            count = anchored(config.batch_size, self.share, self.parts)
            arrays = {key: array[: config.batch_size - count] for key, array in arrays.items()}
            arrays.update(self.anchor.batch(count, rng, self.noise_std))
        if self.dropout:
            arrays["dropout"] = rng.integers(2**32, size=(len(arrays["latents"]), 2), dtype=np.uint32)
        return arrays


def anchored(batch_size: int, share: float, parts: int = 1) -> int:
    """Samples of a batch that belong to the anchor: in each of its parts, at least one of each kind."""
    size = batch_size // parts
    return parts * min(max(round(share * size), 1), size - 1) if share else 0


def finetune_loss(
    flow: STARFlow,
    batch: Batch,
    anchor_weight: float = 1.0,
    base: STARFlow | None = None,
    gradient_checkpointing: bool = True,
) -> tuple[mx.array, Metrics]:
    """NLL of a batch of `FinetuneData` (nats per dimension, without log(2 pi) / 2) plus the anchor's KL divergence.

    With `gradient_checkpointing` layers are computed again for the gradient, so that memory holds one at a time.
    """
    with dropout_key(flow, batch["dropout"][0] if "dropout" in batch else None):
        loss, metrics = batch_loss(flow, batch, gradient_checkpointing)
        if "anchor_x" in batch:
            metrics["kl"] = anchor_kl(flow, batch["anchor_x"], batch["anchor_text"], base)
            loss = loss + anchor_weight * metrics["kl"]
    return loss, metrics


def own_nll(
    flow: STARFlow, cache: LatentCache, images: np.ndarray, *, count: int, seed: int, progress: Watch = False
) -> float:
    """Mean exact NLL, nats per dimension, of samples that a flow draws for captions of some images of a cache.

    What a flow that fits these images would give for them too: the entropy of what it has learned.
    """
    own = AnchorSamples.draw(flow, cache, images, count, seed, progress)
    return float(flow(mx.array(own.x), mx.array(own.text)).nll().mean()) + HALF_LOG_2PI


def cached_nll(
    flow: STARFlow,
    cache: LatentCache,
    images: Sequence[int] | np.ndarray,
    *,
    draws: int,
    seed: int,
    progress: Watch = False,
) -> Nll:
    """Exact NLL of images of a cache, the middle view of each, given their usual captions; see `exact_nll`."""
    images = np.asarray(images)
    parts = []
    for bucket in np.unique(cache.buckets[images]):
        chosen = images[cache.buckets[images] == bucket]
        latents = cache.latents(chosen, np.zeros(len(chosen), np.int64), np.zeros((), np.float32))
        text = mx.array(cache.text([cache.captions[index][0] for index in chosen], cache.ratios[bucket]))
        parts.append(exact_nll(flow, latents, text, draws=draws, seed=seed, progress=progress))
    return Nll(np.concatenate([part.prior for part in parts]), np.concatenate([part.blocks for part in parts]))
