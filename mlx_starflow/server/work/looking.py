"""What a flow says of an image: likelihood, labels, noise, and the image of noise."""

from __future__ import annotations

import base64
from dataclasses import asdict, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.editing import Encoded
from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.heatmap import colours
from mlx_starflow.pipelines import ClassPipeline
from mlx_starflow.server import requests
from mlx_starflow.server.gallery import Gallery, data_url, encoded
from mlx_starflow.server.jobs import Job, Result
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.models import AnyPipeline, Models
from mlx_starflow.server.work.parts import Work, check_count, check_image_room, keep_all, open_for_image, read_image

REDDEST = 4.0
"""Standard deviations at the end of the colours of a map of typicality."""


def score(request: requests.Score) -> Work:
    """Likelihood, surprise map and, if the model is calibrated, typicality of an image."""

    def work(models: Models, job: Job) -> Result:
        pipe, model = open_for_image(models, request.model, request.size), models.find(request.model)
        image = read_image(request.image)
        result = pipe.score(
            [image], request.prompt, draws=request.draws, seed=request.seed, size=request.size, progress=job.progress
        )[0]
        fitted = cast(Image.Image, pipe.fit(image, request.size))
        surprise = result.surprise.reshape(result.surprise.shape[-2:])
        values = result.to_dict() | {"surprise": surprise.tolist(), "unit": model.about["unit"]}
        values |= {
            "image": data_url(encoded(fitted)),
            "map": _map(surprise, float(surprise.min()), float(surprise.max())),
        }
        prompted = bool(request.prompt.strip())
        if model.statistics is not None and ("prompted" in model.statistics.nll or not prompted) and not result.frames:
            typicality = model.statistics.typicality(result, prompted)
            values["deviation"] = typicality.deviation
            if typicality.map is not None:
                values["deviation_map"] = typicality.map.tolist()
                values["typicality_map"] = _map(np.abs(typicality.map), 0.0, REDDEST)
        return values

    return work


def classify(request: requests.Classify, limits: Limits) -> Work:
    """Labels by Bayes' rule. Raises StarflowError."""
    if len(request.labels) > limits.labels:
        raise StarflowError(f"there are at most {limits.labels} labels here, not {len(request.labels)}")

    def work(models: Models, job: Job) -> Result:
        pipe, model = open_for_image(models, request.model, request.size), models.find(request.model)
        labels = list(request.labels) or list(model.about["classes"])
        if not labels:
            raise StarflowError("there are no labels: give some to choose from")
        found = pipe.classify(
            [read_image(request.image)],
            labels,
            draws=request.draws,
            seed=request.seed,
            size=request.size,
            progress=job.progress,
        )
        posterior = dict(zip(labels, map(float, found.posterior[0]), strict=True))
        return {
            "label": found.best[0],
            "probability": max(posterior.values()),
            "margin_nats": float(found.margin[0]) if len(labels) > 1 else None,
            "posterior": posterior,
            "log_likelihood": dict(zip(labels, map(float, found.log_likelihood[0]), strict=True)),
        }

    return work


def encode(request: requests.Encode, gallery: Gallery) -> Work:
    """The noise of an image."""

    def work(models: Models, job: Job) -> Result:
        pipe = open_for_image(models, request.model, request.size)
        image = read_image(request.image)
        found, trip = pipe.encode(
            [image],
            request.prompt,
            guidance=request.guidance,
            noise_seed=request.noise_seed,
            size=request.size,
            check=request.check,
            progress=job.progress,
        )
        with gallery.scratch(".safetensors") as path:
            found.save(path)
            noise = path.read_bytes()
        return {
            "noise": base64.b64encode(noise).decode(),
            "shape": list(found.noise.shape),
            "standard_deviation": float(found.noise.std()),
            "round_trip": None if trip is None else asdict(trip),
            "image": data_url(encoded(cast(Image.Image, pipe.fit(image, request.size)))),
            "noise_image": data_url(encoded(_noise_image(pipe, found.noise))),
        }

    return work


def decode(request: requests.Decode, gallery: Gallery, limits: Limits) -> Work:
    """The images of noise."""

    def work(models: Models, job: Job) -> Result:
        pipe = models.get(request.model)
        with gallery.scratch(".safetensors") as path:
            path.write_bytes(request.noise)
            try:
                found = Encoded.load(path)
            except StarflowError as error:  # the file's name is nobody's business
                raise StarflowError(str(error).replace(str(path), "the noise")) from None
        check_count(limits, len(found.noise), "the pictures of a noise file")
        if request.prompt is not None:
            found = replace(found, prompts=[request.prompt] * len(found.noise))
        for prompt in found.prompts:
            limits.check_text(prompt)
        if not isinstance(pipe, ClassPipeline) and found.noise.ndim >= 4:
            check_image_room(models, models.find(request.model), pipe, pipe.image_size(found.noise.shape))
        images, _ = pipe.decode(found, denoise=request.denoise, progress=job.progress)
        # Of a video the frames.
        made: list[Image.Image | list[Image.Image]] = list(images)
        return keep_all(job, gallery, made, found.described(pipe, denoise=request.denoise), [{}] * len(made))

    return work


def _map(values: np.ndarray, low: float, high: float) -> dict[str, Any]:
    """Numbers, one a token, as an image of one pixel each, and what its colours mean."""
    pixels = colours((values - low) / ((high - low) or 1.0))
    return {"image": data_url(encoded(Image.fromarray(pixels))), "low": low, "high": high}


def _noise_image(pipe: AnyPipeline, noise: np.ndarray) -> Image.Image:
    """The first channels of an image's noise as colours: grey is 0, black and white are 3 standard deviations."""
    if isinstance(pipe, ClassPipeline):
        config = pipe.config
        flow, shape = pipe.flow, (1, config.img_size, config.img_size, config.channel_size)
        noise = np.array(flow.latents(flow.noise_tokens(mx.array(noise[:1])), shape))
    values = noise[0]
    values = values[0] if values.ndim == 4 else values
    channels = values[..., :3] if values.shape[-1] >= 3 else np.repeat(values[..., :1], 3, axis=-1)
    return Image.fromarray(np.round(np.clip(channels / 6 + 0.5, 0, 1) * 255).astype(np.uint8))
