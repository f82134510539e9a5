"""What only a flow can say of itself: exact likelihood, prompt fit, typicality, and whether it has memorized."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.evaluation.measures import Estimate
from mlx_starflow.evaluation.significance import permutation_p
from mlx_starflow.evaluation.store import Part, Store
from mlx_starflow.likelihood.calibration import Statistics
from mlx_starflow.likelihood.nll import bits_per_dimension, is_dequantized
from mlx_starflow.likelihood.scores import score_data
from mlx_starflow.media.image_files import ImageFile
from mlx_starflow.pipelines.class_labels import ClassPipeline
from mlx_starflow.pipelines.image_maker import ImageMaker
from mlx_starflow.sampling.progress import Progress

PART = 16
"""Pictures that are scored at once and kept together."""

UNUSUAL = 2.0
"""Standard deviations from the mean: about one in twenty of the model's own pictures is as far."""


@dataclass(frozen=True)
class Scores:
    """Negative log-likelihoods of pictures in nats per dimension, `[pictures, draws of the noise]`.

    Attributes:
        plain: without a prompt.
        prompted: with each picture's own; None where they have none.
        dimensions: of a picture's data.
    """

    plain: np.ndarray
    prompted: np.ndarray | None
    dimensions: int

    @property
    def nll(self) -> Estimate:
        """Without a prompt, over pictures."""
        return Estimate.of(self.plain.mean(axis=1))

    @property
    def prompt_fit(self) -> Estimate | None:
        """log p(x | prompt) - log p(x) in nats, over pictures; both see the same noise."""
        if self.prompted is None:
            return None
        return Estimate.of((self.plain - self.prompted).mean(axis=1) * self.dimensions)


def score_pictures(
    model: ImageMaker,
    data: np.ndarray,
    prompts: Sequence[str] | None,
    kind: str,
    store: Store,
    progress: Progress,
    *,
    draws: int,
    seed: int,
) -> Scores:
    """Exact likelihood of data `[N, ...]`, as the flow reads them, without noise. `kind` names the parts."""
    arrays: list[Any] = []
    with progress.counting("likelihood", len(data), "picture", label=f"likelihood of {kind}") as counter:
        for number, start in enumerate(range(0, len(data), PART)):
            mine = data[start : start + PART]
            own = None if prompts is None else list(prompts[start : start + PART])

            def compute(mine: np.ndarray = mine, own: list[str] | None = own, number: int = number) -> Part:
                found = {}
                for name, texts in (("plain", ""), ("prompted", own)):
                    if texts is not None:
                        # Each part has noise of its own, and both passes over it the same.
                        scores = score_data(model, mine, texts, draws=draws, seed=seed + number, batch_size=PART)
                        found[name] = np.stack([each.draws for each in scores])
                return Part(found)

            about = {
                "sha256": hashlib.sha256(np.ascontiguousarray(mine).tobytes()).hexdigest(),
                "prompts": own, "draws": draws, "seed": seed + number,
            }  # fmt: skip
            arrays.append(store.keep(f"likelihood-{kind}-{number:05}", about, compute).arrays)
            counter.advance(len(mine))
    model.release("flow")
    plain, prompted = (
        None if name not in arrays[0] else np.concatenate([each[name] for each in arrays])
        for name in ("plain", "prompted")
    )
    assert plain is not None
    return Scores(plain, prompted, int(np.prod(data.shape[1:])))


def chosen(files: Sequence[ImageFile], most: int) -> list[ImageFile]:
    """At most so many files, spread evenly."""
    count = min(most, len(files))
    return [files[number * len(files) // count] for number in range(count)]


def captions_of(model: ImageMaker, files: Sequence[ImageFile]) -> list[str] | None:
    """The prompts of pictures; None if one has none, or none that the model reads."""
    captions = [each.caption.strip() for each in files]
    if not all(captions):
        return None
    if isinstance(model, ClassPipeline):
        try:
            model.check_prompts(captions)
        except StarflowError:
            return None
        return captions if model.classes else None
    return captions


@dataclass(frozen=True)
class Typicality:
    """How far samples' likelihoods are from real pictures', in standard deviations of theirs.

    Attributes:
        deviation: mean over samples; positive is less likely than real pictures are. 0 of a perfect model.
        unusual: the share of samples that are further than `UNUSUAL` away on either side.
    """

    deviation: Estimate
    unusual: float

    @classmethod
    def of(cls, samples: Scores, real: Scores) -> Typicality | None:
        """None where one draw of the noise, or one picture, leaves the spread unknown."""
        images, draws = real.plain.shape
        if min(images, draws) < 2:
            return None
        usual = Statistics.of(real.plain)
        spread = float(usual.std(samples.plain.shape[1]))
        deviations = (samples.plain.mean(axis=1) - float(usual.mean)) / max(spread, 1e-12)
        return cls(Estimate.of(deviations), float((np.abs(deviations) > UNUSUAL).mean()))


@dataclass(frozen=True)
class LikelihoodGap:
    """How much more likely training pictures are to the model than held-out ones, in nats per dimension.

    Attributes:
        difference: NLL of held-out pictures minus that of training pictures, with its standard error.
        p: of the test that nothing but chance makes held-out pictures less likely, see
            `significance.permutation_p`.
    """

    difference: Estimate
    p: float

    @classmethod
    def of(cls, training: Scores, held_out: Scores) -> LikelihoodGap:
        first, second = (each.plain.mean(axis=1) for each in (training, held_out))
        parts = [Estimate.of(each) for each in (first, second)]
        error = float(np.hypot(parts[0].error, parts[1].error))
        return cls(Estimate(parts[1].mean - parts[0].mean, error), permutation_p(first, second))


def bits(model: ImageMaker, nll: float) -> float | None:
    """Bits per pixel and channel, of a dequantized pixel model."""
    return bits_per_dimension(nll) if is_dequantized(model.flow) else None
