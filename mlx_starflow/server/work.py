"""What jobs compute: each function here makes the work of a job, which the worker's thread then calls, of a request.

Results are plain values. Images go into the gallery as soon as each is finished, and watchers are told.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.editing import Encoded
from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.heatmap import colours
from mlx_starflow.media.pixels import UnreadableImage, decode_image, decode_transparency, no_remarks
from mlx_starflow.pipelines import ClassPipeline, VideoPipeline
from mlx_starflow.pipelines.image_maker import ImageMaker
from mlx_starflow.pipelines.upscaling import Upscaler
from mlx_starflow.server import requests
from mlx_starflow.server.gallery import Gallery, Item, LooseItem, data_url, encoded
from mlx_starflow.server.jobs import Event, Job, Result
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.models import AnyPipeline, Model, Models

Work = Callable[[Models, Job], Result]

BATCH = 8
"""Images sampled at once, as `mlx-starflow generate` does."""

REDDEST = 4.0
"""Standard deviations at the end of the colours of a map of typicality."""


def check_count(limits: Limits, count: int, what: str) -> None:
    """Raise StarflowError if a request asks for more than one may."""
    if count > limits.images:
        raise StarflowError(f"{what} must be at most {limits.images} here, not {count}")


def generate(request: requests.Generate, gallery: Gallery, limits: Limits) -> Work:
    """Images of a prompt. Raises StarflowError."""
    check_count(limits, request.n * request.best_of, "n" if request.best_of == 1 else "n times best_of")

    def work(models: Models, job: Job) -> Result:
        opened = models.get(request.model)
        pipe: ImageMaker = opened.image_pipeline if isinstance(opened, VideoPipeline) else opened
        model = models.find(request.model)
        student = None if request.student is None else models.student(model, request.student)
        settings = pipe.with_student(
            pipe.settings, student, request.guidance, request.temperature, request.steps, request.method
        ).updated(attn_temp=request.attn_temp, denoise=request.denoise, size=request.size)
        if request.verify and settings.samples_by_student:
            raise StarflowError("what a student makes is not exact, and has no certificate: leave verify out")
        size, samples = settings.size or pipe.size, request.n * request.best_of
        upscaler = _upscaler(models, request, size)
        # The images that the command makes of this seed, unless memory is short: then they are the same up to rounding.
        batch = _batch(models, model, size, min(BATCH, samples), settings.guidance > 0)
        stream = pipe.stream(
            request.prompt,
            seed=request.seed,
            images=request.n,
            best_of=request.best_of,
            settings=settings,
            batch_size=batch,
            verify=pipe.method(settings) != "sequential" if request.verify is None else request.verify,
            progress=job.progress,
        )
        pictures: list[dict[str, Any]] = []
        for made in stream:
            certificate = None if made.certificate is None else asdict(made.certificate)
            more = {"prompt": made.prompt, "seed": made.seed, "certificate": certificate, "fit": made.fit}
            if upscaler is not None:
                made = made.upscaled(upscaler, progress=job.progress)
            item = (gallery.add if request.keep else LooseItem)(made.image, made.metadata)
            pictures.append(_shown(job, item, len(pictures), more))
        stats = stream.stats
        told = {
            "seconds": stats.seconds,
            "memory": stats.memory,
            "tokens": stats.tokens,
            "evaluations": stats.evaluations,
            "student_evaluations": stats.student_evaluations,
        }
        return {"pictures": pictures, "settings": settings.to_dict(), "stats": told}

    return work


def video(request: requests.Video, gallery: Gallery, limits: Limits) -> Work:
    """A video, whose frames are told as they come."""

    def work(models: Models, job: Job) -> Result:
        pipe, model = models.get(request.model), models.find(request.model)
        if not isinstance(pipe, VideoPipeline):
            raise StarflowError(f"{model.id} makes pictures, not videos")
        if (request.frames or 1) > limits.frames:
            raise StarflowError(f"frames must be at most {limits.frames} here, not {request.frames}")
        size, frames = request.size or pipe.settings.size, request.frames or pipe.settings.frames
        guidance = pipe.settings.guidance if request.guidance is None else request.guidance
        models.check_room(model, size, 1, guidance > 0, min(frames, pipe.format.trained))
        stream = pipe.stream(
            request.prompt,
            seed=request.seed,
            image=None if request.image is None else _decoded(request.image),
            frames=request.frames,
            size=request.size,
            fps=request.fps,
            guidance=request.guidance,
            temperature=request.temperature,
            method=request.method,
            attn_temp=request.attn_temp,
            denoise=request.denoise,
            previews=request.previews,
            progress=job.progress,
        )
        upscaler = _upscaler(models, request, stream.size)

        def told() -> Iterator[Image.Image]:
            for index, frame in enumerate(stream):
                shown = {"index": index, "frames": stream.frames, "image": data_url(encoded(frame))}
                job.publish(Event("frame", shown))
                yield frame

        # Frames are told as they are made, and enlarged for the file.
        made = list(told() if upscaler is None else upscaler.frames(told(), progress=job.progress))
        metadata = stream.metadata if upscaler is None else upscaler.upscaled(stream.metadata)
        item = gallery.add_video(made, stream.fps, metadata)
        shown = _shown(job, item, 0, {"prompt": request.prompt, "seed": stream.seed})
        return {"pictures": [shown], "frames": len(made), "fps": stream.fps}

    return work


def score(request: requests.Score) -> Work:
    """Likelihood, surprise map and, if the model is calibrated, typicality of an image."""

    def work(models: Models, job: Job) -> Result:
        pipe, model = models.get(request.model), models.find(request.model)
        _check_image_room(models, model, pipe, request.size)
        image = _decoded(request.image)
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
        pipe, model = models.get(request.model), models.find(request.model)
        _check_image_room(models, model, pipe, request.size)
        labels = list(request.labels) or list(model.about["classes"])
        if not labels:
            raise StarflowError("there are no labels: give some to choose from")
        found = pipe.classify(
            [_decoded(request.image)],
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
        pipe = models.get(request.model)
        _check_image_room(models, models.find(request.model), pipe, request.size)
        image = _decoded(request.image)
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
            _check_image_room(models, models.find(request.model), pipe, pipe.image_size(found.noise.shape))
        images, _ = pipe.decode(found, denoise=request.denoise, progress=job.progress)
        # Of a video the frames.
        made: list[Image.Image | list[Image.Image]] = list(images)
        return _edited(job, gallery, made, found.described(pipe, denoise=request.denoise), [{}] * len(made))

    return work


def reprompt(request: requests.Reprompt, gallery: Gallery, limits: Limits) -> Work:
    """An image's noise under another prompt. Raises StarflowError."""
    check_count(limits, len(request.strengths), "the number of strengths")

    def work(models: Models, job: Job) -> Result:
        pipe, upscaler = _editor(models, request)
        edit = pipe.reprompt(
            _decoded(request.image),
            request.source,
            request.target,
            request.strengths,
            size=request.size,
            method=request.method,
            progress=job.progress,
        )
        return _edited(
            job, gallery, edit.images, edit.metadata, [{"strength": place} for place in edit.places], upscaler
        )

    return work


def vary(request: requests.Vary, gallery: Gallery, limits: Limits) -> Work:
    """Images near one. Raises StarflowError."""
    check_count(limits, request.n * len(request.strengths), "n times the number of strengths")

    def work(models: Models, job: Job) -> Result:
        pipe, upscaler = _editor(models, request)
        edit = pipe.vary(
            _decoded(request.image),
            request.prompt,
            request.strengths,
            images=request.n,
            temperature=request.temperature,
            seed=request.seed,
            size=request.size,
            method=request.method,
            progress=job.progress,
        )
        more = [
            {"strength": place, "seed": how["seeds"][0]} for place, how in zip(edit.places, edit.metadata, strict=True)
        ]
        return _edited(job, gallery, edit.images, edit.metadata, more, upscaler)

    return work


def interpolate(request: requests.Interpolate, gallery: Gallery, limits: Limits) -> Work:
    """Images between two. Raises StarflowError."""
    check_count(limits, len(request.shares), "the number of shares")

    def work(models: Models, job: Job) -> Result:
        pipe, upscaler = _editor(models, request)
        edit = pipe.interpolate(
            _decoded(request.first),
            _decoded(request.second),
            (request.prompts[0], request.prompts[1]),
            request.shares,
            size=request.size,
            method=request.method,
            progress=job.progress,
        )
        return _edited(job, gallery, edit.images, edit.metadata, [{"share": place} for place in edit.places], upscaler)

    return work


def inpaint(request: requests.Inpaint, gallery: Gallery, limits: Limits) -> Work:
    """An image whose free part is painted anew. Raises StarflowError."""
    check_count(limits, request.n, "n")
    if (request.mask is None) == (request.rectangle is None):
        raise StarflowError("give a mask, or a rectangle x,y,w,h: what of the image is free")

    def work(models: Models, job: Job) -> Result:
        pipe, upscaler = _editor(models, request)
        mask: Image.Image | str = request.rectangle or ""
        if request.mask is not None:
            mask = _mask(request.mask)
        own = {
            "steps": request.steps,
            "rounds": request.rounds,
            "strength": request.strength,
            "feather": request.feather,
        }
        chosen: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        made = pipe.inpaint(
            _decoded(request.image),
            mask,
            request.prompt,
            images=request.n,
            seed=request.seed,
            size=request.size,
            method=request.method,
            progress=job.progress,
            **chosen,
        )
        seeds = [{"seed": request.seed + number} for number in range(request.n)]
        result = _edited(job, gallery, made.images, made.metadata, seeds, upscaler)
        return result | {"nll": made.nll.T.tolist()}

    return work


# ---- parts of them


def _editor(models: Models, request: requests.Edit) -> tuple[AnyPipeline, Upscaler | None]:
    """The model of an edit, for which there is room, and what enlarges its images, if that is asked for."""
    pipe = models.get(request.model)
    _check_image_room(models, models.find(request.model), pipe, request.size)
    return pipe, _upscaler(models, request, request.size)


def _check_image_room(models: Models, model: Model, pipe: AnyPipeline, size: tuple[int, int] | None) -> None:
    models.check_room(model, size or pipe.size, 1, False, 1 if isinstance(pipe, VideoPipeline) else None)


def _batch(models: Models, model: Model, size: tuple[int, int], batch: int, guided: bool) -> int:
    """How many images fit into memory at once, at most `batch`. Raises StarflowError if not one does."""
    frames = 1 if model.about["kind"] == "videos" else None
    while batch > 1:
        try:
            models.check_room(model, size, batch, guided, frames)
            return batch
        except StarflowError:
            batch //= 2
    models.check_room(model, size, 1, guided, frames)
    return 1


def _decoded(content: bytes) -> Image.Image:
    try:
        with no_remarks():
            return decode_image(content)
    except UnreadableImage as error:
        raise StarflowError(f"the image cannot be read: {error}") from None


def _mask(content: bytes) -> Image.Image:
    """White where an image is free: where the mask is transparent, or white if all of it is opaque."""
    try:
        with no_remarks():
            opacity = decode_transparency(content)
    except UnreadableImage as error:
        raise StarflowError(f"the mask cannot be read: {error}") from None
    if opacity is None or opacity.getextrema() == (255, 255):  # such as every canvas of a browser makes
        return _decoded(content)
    return opacity.point(lambda value: 255 - value)


def _upscaler(
    models: Models, request: requests.Sampling | requests.Edit, size: tuple[int, int] | None
) -> Upscaler | None:
    """What enlarges images of a size as a request asks for, if it does. Raises StarflowError, Refusal."""
    if request.upscale is None:
        return None
    model = models.find(request.model)
    width, height = size or model.about["size"]
    return models.upscaler(model, request.upscale, (width, height))


def _edited(
    job: Job,
    gallery: Gallery,
    images: Sequence[Image.Image | list[Image.Image]],
    metadata: Sequence[dict[str, Any]],
    more: Sequence[dict[str, Any]],
    upscaler: Upscaler | None = None,
) -> Result:
    if upscaler is not None:
        images = upscaler(cast(list[Image.Image], images), progress=job.progress)
        metadata = [upscaler.upscaled(each) for each in metadata]
    each = enumerate(zip(images, metadata, more, strict=True))
    return {"pictures": [_kept(job, gallery, image, how, index, own) for index, (image, how, own) in each]}


def _kept(
    job: Job,
    gallery: Gallery,
    made: Image.Image | list[Image.Image],
    metadata: dict[str, Any],
    index: int,
    more: dict[str, Any],
) -> dict[str, Any]:
    if isinstance(made, Image.Image):
        return _shown(job, gallery.add(made, metadata), index, more)
    return _shown(job, gallery.add_video(made, 16, metadata), index, more)


def _shown(job: Job, item: Item | LooseItem, index: int, more: dict[str, Any]) -> dict[str, Any]:
    """What is told of a finished image, to watchers and in the result."""
    told = {**item.describe(), "index": index, **more}
    job.publish(Event("picture", told), keep=index)
    return told


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
