"""What makes an image or a video again, as its own file says: `generate --like` and `video --like`.

Such a file may be somebody else's, so nothing in it is taken as it is: values have types and bounds, and the names of
models and adapters may stand for what is on this machine already, see `Recipe.check_local`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import GUIDANCE_MODES
from mlx_starflow.media.files import exists, expanded
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.adapters import CONFIG_FILE
from mlx_starflow.model_dir.hub import find_model, find_student
from mlx_starflow.models.configs import MOST_LAYERS
from mlx_starflow.pipelines.results import MOST_STEPS
from mlx_starflow.sampling.cache import KV_CHOICES
from mlx_starflow.sampling.methods import DRAFT, METHODS, SamplingPlan, SequentialSettings
from mlx_starflow.sampling.student import MOST_STEPS as MOST_STUDENT_STEPS

MOST_PICTURES = 10_000
"""Prompts times seeds."""

MOST_CHARACTERS = 20_000
"""Of a prompt; models read some hundred tokens."""

MOST_NAME = 1000
"""Characters of a model's, an adapter's or a file's name."""

MOST_ADAPTERS = 64
MOST_UPSCALINGS = 16
MOST_SIDE = 1 << 14
MOST_FRAMES = 100_000

SOURCES = ("image", "video", "extend")
"""Options of `video` for what a video begins with."""


def _number(least: float, most: float) -> Callable[[object], bool]:
    return lambda value: _is_number(value, int | float) and least <= value <= most  # type: ignore[operator]


def _whole(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: _is_number(value, int) and least <= value <= most  # type: ignore[operator]


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _text(most: int, least: int = 0) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and least <= len(value) <= most


def _list(holds: Callable[[object], bool], most: int, least: int = 0) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(holds, value))


def _none_or(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or holds(value)


def _name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_NAME and value.isprintable()


def _adapter(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _name(value[0]) and _number(-1e6, 1e6)(value[1])


def _sources(value: object) -> bool:
    return isinstance(value, dict) and all(kind in SOURCES and _none_or(_name)(name) for kind, name in value.items())


def _upscaling(value: object) -> bool:
    """An entry of `Upscaler.upscaled`."""
    return isinstance(value, dict) and _name(value.get("file")) and _whole(1, 1000)(value.get("scale"))


_SIDES = _list(_whole(1, MOST_SIDE), 2, 2)

_SETTINGS: dict[str, Callable[[object], bool]] = {
    "guidance": _number(0, 1e6),
    "temperature": _number(0, 1e6),
    "method": lambda value: isinstance(value, str) and value in ("auto", *METHODS, DRAFT),
    "attn_temp": _number(1e-6, 1e6),
    "denoise": lambda value: isinstance(value, bool),
    "size": _none_or(_SIDES),
    "kv_bits": lambda value: isinstance(value, str) and value in KV_CHOICES,
    "student": lambda value: value is None or _name(value),
    "steps": _none_or(_whole(1, MOST_STUDENT_STEPS)),
    "annealed_guidance": lambda value: isinstance(value, bool),
    "guidance_mode": lambda value: value is None or (isinstance(value, str) and value in GUIDANCE_MODES),
    "guided_blocks": _none_or(_whole(1, MOST_LAYERS)),
    "denoise_steps": _none_or(_whole(1, MOST_STEPS)),
    "stochastic": lambda value: isinstance(value, bool),
    "clip": lambda value: isinstance(value, bool),
    "frames": _whole(1, MOST_FRAMES),
    "fps": _whole(1, 1000),
    "context": _none_or(_whole(1, MOST_FRAMES)),
}

_ENTRIES: dict[str, Callable[[object], bool]] = {
    "model": _name,
    "adapters": _list(_adapter, MOST_ADAPTERS),
    "prompts": _list(_text(MOST_CHARACTERS), MOST_PICTURES, 1),
    "seeds": _list(_none_or(_whole(0, 2**128 - 1)), MOST_PICTURES, 1),
    "settings": lambda value: isinstance(value, dict),
    "noise_sha256": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "source": _sources,
    "columns": _none_or(_whole(1, MOST_PICTURES)),
    "keep_source": lambda value: isinstance(value, bool),
    "crf": _whole(0, 51),
    "upscaled": _list(_upscaling, MOST_UPSCALINGS),
}


@dataclass(frozen=True)
class Recipe:
    """What makes images, or a video, again.

    Attributes:
        file: which says so.
        model, adapters: their names, and the adapters' strengths.
        prompts, seeds: each prompt with each seed makes an image; no seeds where noise was given.
        settings: of sampling, by name, as `GenerationSettings` and `VideoSettings` have them.
        noise_sha256: of the noise that was given, see `media.noise.digest`.
        source: what a video was made from: a name of `SOURCES`, and the file's, if it had one.
        columns: of the grid, if somebody asked for so many.
        keep_source, crf: how a video was written, see `mlx-starflow video`, if somebody said so.
        upscaled: by which files it was enlarged afterwards, as `Upscaler.metadata` has it, one after another.
    """

    file: Path
    model: str
    prompts: list[str]
    seeds: list[int | None]
    settings: dict[str, Any]
    adapters: tuple[tuple[str, float], ...] = ()
    noise_sha256: str | None = None
    source: Mapping[str, str | None] = field(default_factory=dict)
    columns: int | None = None
    keep_source: bool | None = None
    crf: int | None = None
    upscaled: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, file: Path, *, video: bool = False) -> Recipe:
        """The recipe of an image or, if `video`, of a video.

        Raises:
            StarflowError: the file does not say, was made another way, or asks for something out of bounds.
        """
        found = read_metadata(file)
        settings = found.get("settings")
        is_video = isinstance(settings, dict) and "frames" in settings
        if made_by := found.get("made_by"):
            command = f"mlx-starflow {repr(made_by)[1:-1][:50]}"
            raise StarflowError(
                f"{file} was made by {command}, which --like does not repeat: mlx-starflow info {file} says how"
            )
        if is_video and not video:
            raise StarflowError(f"{file} is a video: mlx-starflow video --like {file}")
        if missing := [key for key in ("model", "prompts", "seeds", "settings") if key not in found]:
            raise StarflowError(f"{file}: its description lacks {', '.join(missing)}")
        if video and not is_video:
            raise StarflowError(f"{file} is no video of this program: mlx-starflow generate --like {file}")
        known = {key: value for key, value in found.items() if key in _ENTRIES}
        _check(file, known, _ENTRIES)
        _check(file, known["settings"], _SETTINGS)
        if len(known["prompts"]) * len(known["seeds"]) > MOST_PICTURES:
            raise StarflowError(f"{file}: its description asks for more than {MOST_PICTURES} pictures")
        if (None in known["seeds"]) != ("noise_sha256" in known):
            raise StarflowError(f"{file}: its description has neither seeds nor a digest of noise for all pictures")
        adapters = tuple((name, float(strength)) for name, strength in known.pop("adapters", []))
        return cls(file, adapters=adapters, **known)

    @property
    def given_seeds(self) -> list[int] | None:
        """The seeds; None if noise was given."""
        seeds = [seed for seed in self.seeds if seed is not None]
        return seeds if len(seeds) == len(self.seeds) else None

    def settings_with(self, plan: SamplingPlan | None, methods: Collection[str]) -> dict[str, Any]:
        """The settings, for a model with this sampling plan or none, where there are these ways of sampling.

        A file that says "auto" and has no plan was written when that was one token after another; today's files name
        what it was. What a window made, one token after another makes too, up to the window's tolerance.
        """
        if self.settings.get("student") is not None:
            return self.settings
        method = self.settings.get("method", "auto")
        known = method in methods or (method == "auto" and plan is not None)
        return self.settings if known else {**self.settings, "method": SequentialSettings.name}

    def check_local(self, *, model: bool = True, adapters: bool = True, student: bool = True) -> None:
        """Raise StarflowError unless model, adapters and student are on this machine already under their names.

        What the user has named need not be checked. Whoever loads the model then must not let it be downloaded either.
        """
        if model:
            check_local_model(self.file, self.model)
        taught = self.settings.get("student") if student else None
        if taught is not None and not exists(find_student(taught) / "config.json"):
            raise StarflowError(
                f"{self.file} was made by the student {taught}, which is not on this machine: give one with --student"
            )
        for name, strength in self.adapters if adapters else ():
            if not exists(expanded(name) / CONFIG_FILE):
                raise StarflowError(
                    f"{self.file} was made with the adapter {name}, which is not on this machine: give one with "
                    f"--lora PATH {strength:g}"
                )


def check_local_model(file: Path, name: str) -> None:
    """Raise StarflowError unless a model that a file names is on this machine already."""
    try:
        find_model(name, download=False)
    except StarflowError as error:
        raise StarflowError(
            f"{file} was made with the model {name}, and a file's word is not enough to fetch one ({error}): "
            f"give it with --model {name}"
        ) from None


def _check(file: Path, values: Mapping[str, Any], rules: Mapping[str, Callable[[object], bool]]) -> None:
    for key, value in values.items():
        if key not in rules:
            raise StarflowError(f"{file}: unknown setting {str(key)[:50]!a}; the file may be of a newer version")
        if not rules[key](value):
            raise StarflowError(f"{file}: its description is damaged, or out of bounds: {key} is {repr(value)[:60]!a}")
