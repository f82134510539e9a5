"""The proof that a sample is right: run the flow forwards and compare with the noise it was made of.

Videos that are longer than the model's window were made window by window, and are run forwards so: each window's
first frames, and those that a video was given to begin with, are what the flow reads, and it is the others that are
compared with their noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import GuidanceMode, GuidanceTarget
from mlx_starflow.models.flow import Flow, frame_count
from mlx_starflow.models.itarflow import at_noise_level
from mlx_starflow.sampling.denoise import at_once
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.progress import Progress, Watch, watch
from mlx_starflow.sampling.video import NoiseSource, windows


@dataclass(frozen=True)
class Certificate:
    """How far f(x), the guided flow run forwards over a sample, is from the noise z that the sample was made of.

    Attributes:
        max: largest |f(x) - z|, in standard deviations of the noise.
        rms: its root mean square.
        noise_floor: the largest residual in a block that the precision cannot tell from 0 (see `noise_floor`); None if
            it was not measured.
    """

    max: float
    rms: float
    noise_floor: float | None = None

    def __str__(self) -> str:
        floor = "" if self.noise_floor is None else f" (this precision resolves {self.noise_floor:.1e})"
        return f"|f(x) - z| at most {self.max:.1e}, RMS {self.rms:.1e}{floor}"

    def to_dict(self) -> dict[str, float]:
        """Plain numbers; what was not measured is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, residuals: np.ndarray) -> Certificate:
        """Of the differences f(x) - z; one that is not a number counts as infinite."""
        values = np.nan_to_num(np.abs(residuals), nan=math.inf)
        return cls(float(values.max()), float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))))

    @classmethod
    def worst(cls, certificates: Sequence[Certificate], sizes: Sequence[int] | None = None) -> Certificate:
        """Of several samples, or parts of one: the largest difference and noise floor, and the RMS over all.

        `sizes`: of each; None: all have one size.
        """
        sizes = [1] * len(certificates) if sizes is None else sizes
        square = sum(size * each.rms**2 for size, each in zip(sizes, certificates, strict=True)) / sum(sizes)
        floors = [each.noise_floor for each in certificates if each.noise_floor is not None]
        largest = max(certificate.max for certificate in certificates)
        return cls(largest, math.sqrt(square), max(floors, default=None))


def certify_each(
    flow: Flow,
    x: mx.array,
    z: mx.array,
    text: mx.array | None = None,
    null_text: mx.array | None = None,
    guidance: float = 0.0,
    *,
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    guidance_target: GuidanceTarget = "ab",
    guidance_mode: GuidanceMode | None = None,
    guided_blocks: int | None = None,
    noise_level: float | None = None,
    given: int = 0,
    window: int | None = None,
    context: int | None = None,
    progress: Watch = False,
) -> list[Certificate]:
    """Certify samples x `[B, H, W, C]`, or videos `[B, T, H, W, C]`, before denoising, of noise z: each by itself, in
    parallel forward passes.

    Args:
        given: so many first frames of the videos were given: the flow reads them, and they are not certified. Their
            noise is not looked at.
        window, context: of long videos, as for `sample_frames`; each window is run forwards by itself.
        progress: a `Progress` can cancel it before each block.

    The other arguments are those of `sample`, and must be the ones that the samples were made with.

    Raises:
        StarflowError: an argument does not fit.
    """
    flow, progress = at_noise_level(flow, noise_level), watch(progress)
    options = SamplingOptions(guidance, attn_temp, annealed_guidance, guidance_target, guidance_mode, guided_blocks)
    part = partial(_certificates, flow, text, null_text, options, progress)
    frames = frame_count(x.shape)
    if frames == 1 and not given:
        return part(x, z, 0)
    if x.shape[:2] != z.shape[:2] or not 0 <= given < frames:
        raise StarflowError(
            f"{given} of {frames} given frames, with noise of shape {tuple(z.shape)}: there must be noise of as many "
            "frames, and one that was not given"
        )
    certifier = FrameCertifier(frames, z, part, given=given, window=window, context=context)
    certifier.push(x)
    return certifier.certificates()


def certify(
    flow: Flow,
    x: mx.array,
    z: mx.array,
    text: mx.array | None = None,
    null_text: mx.array | None = None,
    guidance: float = 0.0,
    *,
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    guidance_target: GuidanceTarget = "ab",
    guidance_mode: GuidanceMode | None = None,
    guided_blocks: int | None = None,
    noise_level: float | None = None,
    given: int = 0,
    window: int | None = None,
    context: int | None = None,
    progress: Watch = False,
) -> Certificate:
    """The certificate of all samples together, see `certify_each`. `noise_level`: of an iTARFlow, see `sample`."""
    return Certificate.worst(
        certify_each(
            flow,
            x,
            z,
            text,
            null_text,
            guidance,
            attn_temp=attn_temp,
            annealed_guidance=annealed_guidance,
            guidance_target=guidance_target,
            guidance_mode=guidance_mode,
            guided_blocks=guided_blocks,
            noise_level=noise_level,
            given=given,
            window=window,
            context=context,
            progress=progress,
        )
    )


CertifyPart = Callable[[mx.array, mx.array, int], list[Certificate]]
"""(data, noise, how many first frames are not certified) -> the certificate of each sample."""


class FrameCertifier:
    """Certifies videos whose frames come one after another, window by window: it keeps the frames of one window.

    Frames that two windows share are certified where they were made, in the first of these.
    """

    def __init__(
        self,
        total: int,
        noise: NoiseSource,
        certify_part: CertifyPart,
        *,
        given: int = 0,
        window: int | None = None,
        context: int | None = None,
    ):
        """Of videos of `total` frames, made of `noise` as by `sample_frames`; the first `given` ones are not certified.

        `certify_part` is called with each window's data and noise, `[B, T, H, W, C]`; the noise of frames that are not
        certified is zero.
        """
        self._noise, self._certify, self._given = noise, certify_part, given
        self._windows = windows(total, window, context)
        self._frames: list[mx.array] = []
        self._found: list[list[Certificate]] = []
        self._sizes: list[int] = []

    def push(self, x: mx.array) -> None:
        """The next frames `[B, k, H, W, C]`, still with the flow's training noise."""
        for index in range(x.shape[1]):
            # Not before the next window begins: then the last one is certified when sampling has let go of its cache.
            if self._full:
                self._certify_window()
            self._frames.append(x[:, index : index + 1])

    def certificates(self) -> list[Certificate]:
        """Of each video, when all frames have come."""
        if self._full:
            self._certify_window()
        return [Certificate.worst(each, self._sizes) for each in zip(*self._found, strict=True)]

    @property
    def _full(self) -> bool:
        return bool(self._windows) and len(self._frames) == self._windows[0][2] - self._windows[0][0]

    def _certify_window(self) -> None:
        first, new, stop = self._windows.pop(0)
        begin = max(new, self._given)
        if begin < stop:
            x, fresh = mx.concatenate(self._frames, axis=1), mx.array(self._noise[:, begin:stop])
            z = mx.concatenate([mx.zeros((x.shape[0], begin - first, *x.shape[2:])), fresh], axis=1)
            self._found.append(self._certify(x, z, begin - first))
            self._sizes.append(stop - begin)
        kept = stop - self._windows[0][0] if self._windows else 0
        self._frames = self._frames[len(self._frames) - kept :]


def _certificates(
    flow: Flow,
    text: mx.array | None,
    null_text: mx.array | None,
    options: SamplingOptions,
    progress: Progress,
    x: mx.array,
    z: mx.array,
    given: int,
) -> list[Certificate]:
    """Of samples that one window holds, without their first `given` frames: as many at once as `denoise` takes."""
    tokens, noise, count = flow.tokens(x), flow.noise_tokens(z), at_once(flow, x, text)
    skipped = noise.shape[1] // frame_count(x.shape) * given
    found = []
    for start in range(0, len(tokens), count):
        part = slice(start, start + count)
        null = null_text if null_text is None or len(null_text) == 1 else null_text[part]
        guided = GuidedFlow(flow, z[part].shape, None if text is None else text[part], null, options)
        residuals = np.array((guided.forward(tokens[part], progress) - noise[part])[:, skipped:])
        found += [Certificate.of(each) for each in residuals]
    return found
