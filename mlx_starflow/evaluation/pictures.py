"""The pictures of an evaluation: real ones from files, and samples of the model, with their features, part by part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.evaluation.clip_score import CLIPScorer
from mlx_starflow.evaluation.features import Features
from mlx_starflow.evaluation.prompts import ListedPrompt
from mlx_starflow.evaluation.store import Part, Store
from mlx_starflow.media.image_files import ImageFile
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.pipelines.image_maker import ImageMaker
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.sampling.progress import Progress

PART = 64
"""Pictures of a part: what is lost at most when an evaluation is stopped."""

MOST_SAMPLES = 1_000_000


@dataclass(frozen=True)
class Pictures:
    """Pictures that were read.

    Attributes:
        files: of those that could be read.
        features: `[N, D]`.
        skipped: names of the others, and why.
    """

    files: list[ImageFile]
    features: np.ndarray
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """Pictures that the model made.

    Attributes:
        prompts: of each.
        features: `[N, D]`.
        data: of the first of them, as the flow reads them, `[n, ...]`; None if there are none.
        clip: CLIP scores, `[N]`; None without a CLIP.
        certificate: the worst of all, NaN where none was computed.
    """

    prompts: list[ListedPrompt]
    features: np.ndarray
    data: np.ndarray | None
    clip: np.ndarray | None
    certificate: float


def read_pictures(
    model: ImageMaker,
    files: Sequence[ImageFile],
    kind: str,
    features: Features,
    store: Store,
    progress: Progress,
    size: tuple[int, int],
) -> Pictures:
    """Features of pictures in files, each fitted to `size` as the model sees it. `kind` names the parts.

    Raises:
        StarflowError: none of them can be read.
    """
    kept: list[ImageFile] = []
    found: list[np.ndarray] = []
    skipped: list[tuple[str, str]] = []
    with progress.counting("features", len(files), "picture", label=f"features of {kind}") as counter:
        for number, start in enumerate(range(0, len(files), PART)):
            mine = files[start : start + PART]

            def compute(mine: Sequence[ImageFile] = mine) -> Part:
                return _read_part(model, mine, features, size)

            about = {**_contents(mine), "size": size, "features": features.identity}
            part = store.keep(f"{kind}-{number:05}", about, compute)
            reasons = part.notes["skipped"]
            kept += [each for each in mine if each.name not in reasons]
            skipped += list(reasons.items())
            found.append(part.arrays["features"])
            counter.advance(len(mine))
    if not kept:
        raise StarflowError(f"no picture of the {kind} can be read: {skipped[0][1]}")
    return Pictures(kept, np.concatenate(found), skipped)


def _contents(files: Sequence[ImageFile]) -> dict[str, object]:
    """What tells these files from others."""
    digest = hashlib.sha256()
    for each in files:
        try:
            digest.update(hashlib.sha256(each.read()).digest())
        except (OSError, ValueError) as error:
            digest.update(type(error).__name__.encode())
    return {"files": [each.name for each in files], "sha256": digest.hexdigest()}


def _read_part(model: ImageMaker, files: Sequence[ImageFile], features: Features, size: tuple[int, int]) -> Part:
    pixels, reasons = [], {}
    for each in files:
        try:
            pixels.append(np.asarray(model.fit(each.open(), size)))
        except StarflowError as error:
            reasons[each.name] = str(error)
    made = features(np.stack(pixels)) if pixels else np.zeros((0, features.dimensions), np.float32)
    return Part({"features": made}, {"skipped": reasons})


def make_samples(
    model: ImageMaker,
    prompts: Sequence[ListedPrompt],
    count: int,
    settings: GenerationSettings,
    features: Features,
    clip: CLIPScorer | None,
    store: Store,
    progress: Progress,
    *,
    seed: int,
    batch_size: int,
    with_data: int,
    verify: bool,
) -> Samples:
    """Samples for prompts, in turn, of the seeds `seed`, `seed` + 1 and so on.

    Each is the picture that `generate` makes of its prompt and seed. `with_data` is how many of them come with their
    data too.
    """
    each = max(batch_size, PART // batch_size * batch_size)
    parts: list[Part] = []
    with progress.counting("evaluation", count, "picture", label="samples") as counter:
        for number, start in enumerate(range(0, count, each)):
            mine = range(start, min(start + each, count))
            own = [prompts[index % len(prompts)].text for index in mine]
            data = max(0, min(mine.stop, with_data) - start)

            def compute(mine: range = mine, own: Sequence[str] = own, data: int = data) -> Part:
                noise = draw_noise([seed + index for index in mine], model.noise_shape(settings.size))
                return _sample_part(model, own, noise, settings, features, clip, progress, batch_size, data, verify)

            parts.append(store.keep(f"samples-{number:05}", {"prompts": own, "data": data}, compute))
            counter.advance(len(mine))
    arrays = {
        name: np.concatenate([part.arrays[name] for part in parts if name in part.arrays])
        for name in dict.fromkeys(name for part in parts for name in part.arrays)
    }
    listed = [prompts[index % len(prompts)] for index in range(count)]
    worst = max((float(part.notes["certificate"]) for part in parts if "certificate" in part.notes), default=np.nan)
    return Samples(listed, arrays["features"], arrays.get("data"), arrays.get("clip"), worst)


def _sample_part(
    model: ImageMaker,
    prompts: Sequence[str],
    noise: np.ndarray,
    settings: GenerationSettings,
    features: Features,
    clip: CLIPScorer | None,
    progress: Progress,
    batch_size: int,
    data: int,
    verify: bool,
) -> Part:
    stream = model.stream(
        prompts, noise=noise, settings=settings, batch_size=batch_size, live=False, verify=verify, progress=progress
    )
    images = [made.image for made in stream]
    pixels = np.stack([np.asarray(image) for image in images])
    arrays = {"features": features(pixels)}
    if clip is not None:
        arrays["clip"] = clip(pixels, prompts)
    if data:
        arrays["data"] = model.to_data(images[:data], settings.size)
    model.release("vae")
    certificate = stream.stats.certificate
    return Part(arrays, {} if certificate is None else {"certificate": certificate.max})
