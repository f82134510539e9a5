"""The ways of inverting a flow block and their settings; which of them to use for each block of a flow."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.errors.arguments import checked_class
from mlx_starflow.media.files import exists, inside, read_json, replacing
from mlx_starflow.model_dir.files import PLAN_FILE
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.models.configs import ConfigKind
from mlx_starflow.sampling.cache import KV_BITS, KVBits, kv_name

PLAN = ConfigKind("sampling plan")

DRAFT = "draft"
"""The method that is a rolling window whose first guesses are a student's."""

NO_STUDENT = "drafts are a student's: give a student, or sample by another method"

FRAME_GUESSES = ("previous", "motion", "previous-affine", "motion-affine")
GUESSES = ("noise", "affine", *FRAME_GUESSES, DRAFT)
"""First guesses of a token in a rolling window: see `RollingSettings.guess`."""


@dataclass(frozen=True)
class SequentialSettings:
    """One token after another: exact up to rounding, one network evaluation a token."""

    name: ClassVar[str] = "sequential"


@checked_class
@dataclass(frozen=True)
class JacobiSettings:
    """Block-wise Jacobi iteration as in the official release.

    A block of `block_size` tokens is done when the mean square of the change falls below `threshold` times that of
    the values, or after `max_iterations` sweeps.
    """

    name: ClassVar[str] = "jacobi"
    block_size: int = 16
    threshold: float = 1e-3
    max_iterations: int = 32

    def __post_init__(self) -> None:
        _at_least(self, "block_size", 1)
        _at_least(self, "threshold", 0)
        _at_least(self, "max_iterations", 1)


@checked_class
@dataclass(frozen=True)
class RollingSettings:
    """Jacobi iteration in a window that slides past every token whose residual has been measured to be small.

    Attributes:
        window: tokens evaluated at once; more than the sequence has means all of it.
        tolerance: largest residual |(x - mu) / sigma - z| of a token, in standard deviations of the noise. In half
            precision it is raised to twice what that resolves, if the window is held up by it (see `noise_floor`).
        guess: what a token is taken to be when it enters the window: "noise" its z, "affine" its z mapped as the last
            token in the window was, "previous" what the token `lag` before it is (where there is one), "motion" the
            same moved on by as much as it differs from the one `2 * lag` before, "previous-affine" and "motion-affine"
            its z mapped as these tokens were or would be; "draft" what a student guesses of the whole block (see
            `sampling.student`).
        lag: distance for "previous" and "motion": a row of an image, a frame of a video.
    """

    name: ClassVar[str] = "rolling"
    window: int = 64
    tolerance: float = 1e-3
    guess: str = "noise"
    lag: int = 0

    def __post_init__(self) -> None:
        _at_least(self, "window", 1)
        _at_least(self, "tolerance", 0)
        _at_least(self, "lag", 0)
        if self.guess not in GUESSES:
            raise StarflowError(f"unknown first guess {self.guess!r}; it must be one of {', '.join(GUESSES)}")
        if self.guess in FRAME_GUESSES and not self.lag:
            raise StarflowError(f'the first guess "{self.guess}" needs a lag: tokens of a row or of a frame')


Uniform = SequentialSettings | JacobiSettings | RollingSettings
METHODS: dict[str, type[Uniform]] = {kind.name: kind for kind in (SequentialSettings, JacobiSettings, RollingSettings)}


@checked_class
@dataclass(frozen=True)
class FramewiseSettings:
    """A video's first frame in one way, and the later ones, which have a frame before them, in another.

    A block that reads each frame by itself, and a picture, are first frames throughout.
    """

    name: ClassVar[str] = "framewise"
    first: Uniform
    later: Uniform


Settings = Uniform | FramewiseSettings


def _at_least(settings: Any, key: str, least: int) -> None:
    value = getattr(settings, key)
    if not (isinstance(value, (int, float)) and value >= least and math.isfinite(value)):
        raise StarflowError(f"{settings.name} sampling: {key} must be {least} or more, not {value!r}")


@dataclass(frozen=True)
class SamplingPlan:
    """How each block of one flow is inverted, as `tuning.tune` found it.

    Attributes:
        blocks: settings of each block, data side first.
        tolerance: largest certificate (`certificate.certify`) that was allowed.
        measured: what tuning saw: guidance, certificate, evaluations, machine; for people to read.
        fingerprint: of the weights that it was measured with, see `model_dir.fingerprint`; "" in plans that do not say.
        precision: what the flow multiplied in, such as "float16"; "" in plans that do not say.
        kv_bits: of keys and values, see `cache.KV_BITS`.
        frame: tokens of a frame of the videos that it was measured with; 0: these were pictures.
    """

    blocks: tuple[Settings, ...]
    tolerance: float
    measured: Mapping[str, Any]
    fingerprint: str = ""
    precision: str = ""
    kv_bits: KVBits = 0
    frame: int = 0

    def fits(self, precision: str, kv_bits: KVBits | None = None) -> bool:
        """Whether it is for a flow of this precision, "" is any, and keys and values in so many bits; None is any."""
        fits_cache = kv_bits is None or self.kv_bits == kv_bits
        return fits_cache and ("" in (self.precision, precision) or self.precision == precision)

    @property
    def drafts(self) -> bool:
        """Whether a student gives first guesses."""
        return any(isinstance(each, RollingSettings) and each.guess == DRAFT for each in self.blocks)

    def without_drafts(self) -> SamplingPlan:
        """The same for a flow without its student: windows that begin with the noise, and keep to the tolerances."""
        if not self.drafts:
            return self
        blocks = [
            replace(each, guess="noise") if isinstance(each, RollingSettings) and each.guess == DRAFT else each
            for each in self.blocks
        ]
        return replace(self, blocks=tuple(blocks))

    def to_dict(self) -> dict[str, Any]:
        blocks = [_named(block) for block in self.blocks]
        values = {"version": 1, "tolerance": self.tolerance, "blocks": blocks, "measured": dict(self.measured)}
        marks: dict[str, Any] = {"fingerprint": self.fingerprint, "precision": self.precision}
        marks |= {"kv_bits": _kept(self.kv_bits), "frame": self.frame}
        return values | {key: mark for key, mark in marks.items() if mark}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "sampling plan") -> SamplingPlan:
        """Raises StarflowError for what `to_dict` does not write."""
        try:
            if values["version"] != 1:
                raise StarflowError(
                    f"{where}: version {repr(values['version'])[:50]} is not known; run `mlx-starflow tune` again"
                )
            blocks = tuple(_settings(block) for block in values["blocks"])
            tolerance = _typed("tolerance", "float", values["tolerance"])
            measured = dict(values.get("measured", {}))
            mark, precision = str(values.get("fingerprint", "")), str(values.get("precision", ""))
            kv_bits = _kv_bits(values.get("kv_bits", 0))
            frame = PLAN.typed("frame", "int", values.get("frame", 0), least=0)
            return cls(blocks, float(tolerance), measured, mark, precision, kv_bits, frame)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StarflowError(
                f"{where} is damaged ({one_line(error)[:200]}); run `mlx-starflow tune` again"
            ) from None

    def save(self, directory: Path) -> Path:
        """Write the plan into a model directory; returns the file. Raises StarflowError if that cannot be done."""
        path = directory / PLAN_FILE
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    def find(cls, directory: Path, precision: str = "", config: Mapping[str, Any] | None = None) -> SamplingPlan | None:
        """The plan in a model directory for a flow of a precision ("" is any); `config` as `fingerprint` takes it.

        None if there is none, or it is another model's or another precision's, which is warned about.
        """
        path = directory / PLAN_FILE
        if not exists(path):
            return None
        try:
            values = read_json(inside(directory, PLAN_FILE))
        except StarflowError as error:
            raise StarflowError(f"{path} is damaged ({error}); run `mlx-starflow tune` again") from None
        found = cls.from_dict(values, str(path))
        if found.fingerprint and found.fingerprint != fingerprint(directory, config):
            warnings.warn(
                f"{path} was measured with other weights and is ignored; run `mlx-starflow tune` again", stacklevel=2
            )
            return None
        if not found.fits(precision):
            warnings.warn(
                f"{path} was measured in {found.precision} and is ignored in {precision}; run `mlx-starflow tune` "
                f"again, or use --dtype {found.precision}",
                stacklevel=2,
            )
            return None
        return found


def _kept(bits: KVBits) -> int | str:
    """Bits of keys and values as a file holds them: both branches' by their name."""
    return kv_name(bits) if isinstance(bits, tuple) else bits


def _kv_bits(value: object) -> KVBits:
    both = next((bits for bits in KV_BITS if isinstance(bits, tuple) and kv_name(bits) == value), None)
    return both or PLAN.typed("kv_bits", "int", value, least=0)


def _named(settings: Settings) -> dict[str, Any]:
    if isinstance(settings, FramewiseSettings):
        return {"method": settings.name, "first": _named(settings.first), "later": _named(settings.later)}
    return {"method": settings.name, **asdict(settings)}


def _settings(values: Mapping[str, Any]) -> Settings:
    values = dict(values)
    name = values.pop("method")
    if name == FramewiseSettings.name:
        return FramewiseSettings(_uniform(values.pop("first")), _uniform(values.pop("later")))
    return _uniform({"method": name, **values})


def _uniform(values: Mapping[str, Any]) -> Uniform:
    values = dict(values)
    name = values.pop("method")
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {str(name)[:50]}")
    kind = METHODS[name]
    if unknown := set(values) - {item.name for item in fields(kind)}:
        raise ValueError(f"unknown settings {', '.join(sorted(unknown))}")
    types = {item.name: str(item.type) for item in fields(kind)}
    return kind(**{key: _typed(key, types[key], value) for key, value in values.items()})


def _typed(name: str, kind: str, value: object) -> Any:
    try:
        return PLAN.typed(name, kind, value, least=0)
    except StarflowError as error:
        raise ValueError(str(error)) from None


Method = str | Settings | SamplingPlan
"""How to sample: the name of a method, its settings, or a plan."""


def for_videos(method: Method, size: int) -> Method:
    """What the name of a method means for videos with frames of `size` tokens.

    "jacobi" has blocks of 32 tokens, as the release has (four times as long after the first frame), and "rolling" takes
    the frame before for its first guess. A plan that was measured with frames of another size has windows of as many
    frames of this one.
    """
    if isinstance(method, SamplingPlan) and method.frame not in (0, size):
        return replace(method, blocks=tuple(_resized(block, method.frame, size) for block in method.blocks), frame=size)
    if method == JacobiSettings.name:
        return JacobiSettings(block_size=32)
    if method == RollingSettings.name:
        return RollingSettings(guess="previous", lag=size)
    return method


def _resized(settings: Settings, frame: int, size: int) -> Settings:
    """Settings for frames of `frame` tokens, for those of `size`."""
    if isinstance(settings, FramewiseSettings):
        return FramewiseSettings(
            _resized_uniform(settings.first, frame, size), _resized_uniform(settings.later, frame, size)
        )
    return _resized_uniform(settings, frame, size)


def _resized_uniform(settings: Uniform, frame: int, size: int) -> Uniform:
    if not isinstance(settings, RollingSettings):
        return settings
    window = settings.window if settings.window < frame else max(1, settings.window * size // frame)
    return replace(settings, window=window, lag=size if settings.lag else 0)


def block_settings(method: Method, blocks: int) -> Sequence[Settings]:
    """The settings of each of a flow's blocks, data side first.

    Raises:
        StarflowError: there is no such method, or the plan is one of another flow.
    """
    if isinstance(method, SamplingPlan):
        if len(method.blocks) != blocks:
            raise StarflowError(
                f"the sampling plan is for {len(method.blocks)} blocks, and this flow has {blocks}; "
                "run `mlx-starflow tune` again"
            )
        return method.blocks
    if method == DRAFT:
        method = RollingSettings(guess=DRAFT)
    if isinstance(method, str):
        if method not in METHODS:
            raise StarflowError(f"unknown sampling method {method!r}; it must be one of {', '.join(METHODS)}")
        method = METHODS[method]()
    return (method,) * blocks
