"""What the work of several kinds of jobs is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.pixels import UnreadableImage, decode_image, no_remarks
from mlx_starflow.pipelines import VideoPipeline
from mlx_starflow.pipelines.upscaling import Upscaler
from mlx_starflow.server import requests
from mlx_starflow.server.gallery import Gallery, Item, LooseItem
from mlx_starflow.server.jobs import Event, Job, Result
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.models import AnyPipeline, Model, Models

Work = Callable[[Models, Job], Result]


def check_count(limits: Limits, count: int, what: str) -> None:
    """Raise StarflowError if a request asks for more than one may."""
    if count > limits.images:
        raise StarflowError(f"{what} must be at most {limits.images} here, not {count}")


def check_image_room(models: Models, model: Model, pipe: AnyPipeline, size: tuple[int, int] | None) -> None:
    """Raise StarflowError if there is no room for an image, or a single frame, of a size."""
    models.check_room(model, size or pipe.size, 1, False, 1 if isinstance(pipe, VideoPipeline) else None)


def open_for_image(models: Models, id: str | None, size: tuple[int, int] | None) -> AnyPipeline:
    """The model of an id, loaded, if there is room for an image, or a single frame, of a size.

    Raises StarflowError, Refusal.
    """
    pipe = models.get(id)
    check_image_room(models, models.find(id), pipe, size)
    return pipe


def read_image(content: bytes) -> Image.Image:
    """What a client sent. Raises StarflowError."""
    try:
        with no_remarks():
            return decode_image(content)
    except UnreadableImage as error:
        raise StarflowError(f"the image cannot be read: {error}") from None


def chosen_upscaler(
    models: Models, request: requests.Sampling | requests.Edit, size: tuple[int, int] | None
) -> Upscaler | None:
    """What enlarges images of a size as a request asks for, if it does. Raises StarflowError, Refusal."""
    if request.upscale is None:
        return None
    model = models.find(request.model)
    width, height = size or model.about["size"]
    return models.upscaler(model, request.upscale, (width, height))


def keep_all(
    job: Job,
    gallery: Gallery,
    images: Sequence[Image.Image | list[Image.Image]],
    metadata: Sequence[dict[str, Any]],
    more: Sequence[dict[str, Any]],
    upscaler: Upscaler | None = None,
) -> Result:
    """Put images, or frames of videos, into the gallery, enlarged if there is an upscaler; the result that says so."""
    if upscaler is not None:
        images = upscaler(cast(list[Image.Image], images), progress=job.progress)
        metadata = [upscaler.upscaled(each) for each in metadata]
    each = enumerate(zip(images, metadata, more, strict=True))
    return {"pictures": [keep(job, gallery, image, how, index, own) for index, (image, how, own) in each]}


def keep(
    job: Job,
    gallery: Gallery,
    made: Image.Image | list[Image.Image],
    metadata: dict[str, Any],
    index: int,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Put an image, or the frames of a video, into the gallery, and tell of it."""
    if isinstance(made, Image.Image):
        return show(job, gallery.add(made, metadata), index, more)
    return show(job, gallery.add_video(made, 16, metadata), index, more)


def show(job: Job, item: Item | LooseItem, index: int, more: dict[str, Any]) -> dict[str, Any]:
    """What is told of a finished image, to watchers and in the result."""
    told = {**item.describe(), "index": index, **more}
    job.publish(Event("picture", told), keep=index)
    return told
