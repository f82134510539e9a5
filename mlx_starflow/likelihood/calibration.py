"""Typicality: how far an image's likelihood is from what the model's training images have.

The most likely point of a density in many dimensions is not a typical one: samples gather where likelihood times volume
is large, and flat, simple images can be more likely than every training image (arXiv 1810.09136). So what tells
an anomaly is a likelihood that is unusual, be it low or high (arXiv 1906.02994).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.protocol import ImageModel
from mlx_starflow.likelihood.scores import Score, score_data
from mlx_starflow.media.files import exists, inside, read_json, replacing
from mlx_starflow.model_dir.files import STATISTICS_FILE
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.sampling.progress import Callback, Watch, watch


@dataclass(frozen=True)
class Statistics:
    """Mean and variances of numbers of any shape over images and, within an image, over draws of the noise."""

    mean: np.ndarray
    between: np.ndarray
    within: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Statistics:
        """Of `[images, draws, ...]`, 2 or more of both."""
        within = values.var(axis=1, ddof=1).mean(axis=0)
        means = values.mean(axis=1)
        between = np.maximum(means.var(axis=0, ddof=1) - within / values.shape[1], 0)
        return cls(means.mean(axis=0), between, within)

    def std(self, draws: int) -> np.ndarray:
        """Standard deviation of an image's mean over so many draws."""
        return np.sqrt(self.between + self.within / draws)

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key).tolist() for key in ("mean", "between", "within")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        parts = [np.asarray(values[key], np.float64) for key in ("mean", "between", "within")]
        if not all(np.isfinite(part).all() and part.shape == parts[0].shape for part in parts):
            raise ValueError("not finite")
        if (parts[1] < 0).any() or (parts[2] < 0).any():
            raise ValueError("variances below 0")
        return cls(*parts)


@dataclass(frozen=True)
class Typicality:
    """How unusual an image's likelihood is.

    Attributes:
        deviation: (NLL - mean) / std, in standard deviations of the calibration images: positive is less likely than
            usual, negative more.
        map: the same of each token's nats, `[*grid]`; None for an image of another size than theirs.
    """

    deviation: float
    map: np.ndarray | None

    @property
    def distance(self) -> float:
        """|NLL - mean| / std: the larger, the less typical."""
        return abs(self.deviation)


@dataclass(frozen=True)
class CalibrationStatistics:
    """What the likelihood of a model's own images is: statistics of NLL (nats per dimension) and of tokens' nats.

    Attributes:
        fingerprint: of the weights that it belongs to.
        images: how many there were.
        nll: "unprompted", and "prompted" if the images had captions: statistics of the NLL, scalars.
        tokens: the same of each token's nats, `[*grid]`.
    """

    fingerprint: str
    images: int
    nll: Mapping[str, Statistics]
    tokens: Mapping[str, Statistics]

    def typicality(self, score: Score, prompted: bool = False) -> Typicality:
        """Of an image that was scored with a prompt or without.

        Raises:
            StarflowError: it was scored with a prompt, and the calibration images had no captions; or it is a video.
        """
        kind = "prompted" if prompted else "unprompted"
        if score.frames:
            raise StarflowError("the model was calibrated with pictures: a video cannot be compared with them")
        if kind not in self.nll:
            raise StarflowError(
                "the pictures that the model was calibrated with had no captions: score without a prompt, or run "
                "`mlx-starflow calibrate` on a folder of pictures with a metadata.jsonl"
            )
        draws = len(score.nats)
        deviation = _deviation(np.asarray(score.nll), self.nll[kind], draws)
        tokens = self.tokens[kind]
        same = score.surprise.shape == tokens.mean.shape
        return Typicality(float(deviation), _deviation(score.surprise, tokens, draws) if same else None)

    # ---- files

    def save(self, directory: Path) -> Path:
        """Write into a model directory. Raises StarflowError."""
        path = directory / STATISTICS_FILE
        values = {
            "version": 1,
            "fingerprint": self.fingerprint,
            "pictures": self.images,
            "nll": {kind: each.to_dict() for kind, each in self.nll.items()},
            "tokens": {kind: each.to_dict() for kind, each in self.tokens.items()},
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n")
        return path

    @classmethod
    def find(cls, directory: Path) -> CalibrationStatistics | None:
        """The statistics in a model directory; None if there are none, or they are of other weights.

        Of the latter it warns.

        Raises:
            StarflowError: the file is damaged.
        """
        path = directory / STATISTICS_FILE
        if not exists(path):
            return None
        values = read_json(inside(directory, STATISTICS_FILE))
        try:
            if values["version"] != 1:
                raise ValueError("another version")
            statistics = [
                {kind: Statistics.from_dict(each) for kind, each in values[name].items()} for name in ("nll", "tokens")
            ]
            found = cls(str(values["fingerprint"]), int(values["pictures"]), *statistics)
            if "unprompted" not in found.nll or found.nll.keys() != found.tokens.keys():
                raise ValueError("incomplete")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise StarflowError(
                f"{path} is damaged ({one_line(error)[:200]}); run `mlx-starflow calibrate` again"
            ) from None
        if found.fingerprint == fingerprint(directory):
            return found
        warnings.warn(
            f"{path} was measured with other weights and is ignored; run `mlx-starflow calibrate` again", stacklevel=2
        )
        return None


def _deviation(values: np.ndarray, statistics: Statistics, draws: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num((values - statistics.mean) / statistics.std(draws), nan=0.0)


@checked
def calibrate(
    model: ImageModel,
    data: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    progress: Watch = False,
    callback: Callback | None = None,
) -> CalibrationStatistics:
    """Statistics of images that the model should take to be usual.

    Args:
        model: a pipeline, or another model.
        data: the images as `ImageModel.to_data` gives them, `[B, ...]`, 2 or more.
        captions: of each image, if they have any: then there are also statistics for images with their prompt.
        draws: of the training noise, 2 or more.
        seed, batch_size, progress, callback: as for `score`.

    Raises:
        StarflowError: there are too few images or draws, or the likelihood is not finite.
    """
    if len(data) < 2 or draws < 2:
        raise StarflowError(f"statistics need 2 pictures and 2 draws or more, not {len(data)} and {draws}")
    progress = watch(progress, callback)
    nll, tokens = {}, {}
    for kind, prompts in {"unprompted": "", "prompted": captions}.items():
        if prompts is None:
            continue
        scores = score_data(model, data, prompts, draws=draws, seed=seed, batch_size=batch_size, progress=progress)
        nll[kind] = Statistics.of(np.stack([each.draws for each in scores]))
        tokens[kind] = Statistics.of(np.stack([each.nats.sum(axis=1) for each in scores]))
    return CalibrationStatistics(fingerprint(model.directory), len(data), nll, tokens)


def describe(statistics: Statistics) -> str:
    """Mean and standard deviation between images, as text."""
    return f"{float(statistics.mean):.4f} +- {math.sqrt(float(statistics.between)):.4f}"
