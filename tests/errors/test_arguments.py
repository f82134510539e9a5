"""Calls of public functions with wrong names and wrong types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from PIL import Image

import mlx_starflow
from mlx_starflow import GenerationSettings, load
from mlx_starflow.errors.arguments import checked, checked_class
from mlx_starflow.sampling import JacobiSettings, RollingSettings


@checked
def draw(
    prompt: str,
    image: str | Path | Image.Image | None = None,
    *,
    seed: int | Sequence[int] | None = None,
    strength: float = 0.5,
    size: tuple[int, int] | None = None,
    accept: Literal["kept", "whole"] = "kept",
    verify: bool = True,
    images: Iterable[Image.Image] = (),
    noise: np.ndarray | None = None,
    callback: Callable[[int], object] | None = None,
    later: Later | None = None,
) -> str:
    """Draw."""
    return prompt


@dataclass
class Later:
    x: int = 0


def test_the_signature_and_the_docstring_stay():
    assert draw.__doc__ == "Draw." and list(inspect.signature(draw).parameters)[:3] == ["prompt", "image", "seed"]


@pytest.mark.parametrize(
    "options",
    [
        {"image": "x.png"}, {"image": Path("x")}, {"image": Image.new("RGB", (1, 1))}, {"seed": 3},
        {"seed": [1, 2]},
        {"seed": range(3)}, {"seed": np.int64(3)}, {"seed": np.arange(3)}, {"strength": 1},
        {"strength": np.float32(0.5)},
        {"size": (1, 2)}, {"size": [1, 2]}, {"accept": "whole"}, {"verify": False}, {"verify": np.bool_(True)},
        {"images": iter([])}, {"noise": np.zeros(2)}, {"callback": print}, {"later": Later()}, {"seed": None},
    ],
)  # fmt: skip
def test_what_fits(options):
    assert draw("a", **options) == "a"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sed": 3}, "draw has no argument 'sed': did you mean 'seed'?"),
        ({"strengths": 3}, "draw has no argument 'strengths': did you mean 'strength'?"),
        ({"xyzzy": 3}, "draw has no argument 'xyzzy'; it has prompt, image, seed,"),
        ({"prompt": "b"}, "draw: prompt is given twice"),
        ({"image": 3}, "draw: image must be a path or a PIL image, not 3"),
        ({"seed": "x"}, "draw: seed must be a whole number or a list of whole numbers, not 'x'"),
        ({"seed": 1.5}, "not 1.5"),
        ({"seed": True}, "not True"),
        ({"seed": [1, "a"]}, "not [1, 'a']"),
        ({"strength": "0.5"}, "draw: strength must be a number, not '0.5'"),
        ({"strength": np.zeros(2)}, "not a NumPy array of shape [2]"),
        ({"size": 256}, "draw: size must be two whole numbers, not 256"),
        ({"size": (1, 2, 3)}, "not (1, 2, 3)"),
        ({"size": np.zeros(2)}, "not a NumPy array of shape [2]"),
        ({"accept": "all"}, "draw: accept must be 'kept' or 'whole', not 'all'"),
        ({"verify": "no"}, "draw: verify must be True or False, not 'no'"),
        ({"images": 3}, "draw: images must be a list of PIL images, not 3"),
        ({"images": [3]}, "not [3]"),
        ({"noise": [1.0]}, "draw: noise must be a NumPy array, not [1.0]"),
        ({"callback": 3}, "draw: callback must be a function, not 3"),
        ({"later": {}}, "draw: later must be a Later, not a dict"),
        ({"strength": "x" * 100}, "xxx..."),
    ],
)
def test_mistakes(options, reason):
    assert reason in message(draw, "a", **options)


def test_what_is_missing_and_what_is_too_much():
    assert message(draw) == "draw: prompt must be given"
    assert "only prompt, image can be given without a name; the others need theirs, such as seed=" in message(
        draw, "a", "b", 3
    )


def test_a_mistake_within_the_function_stays_what_it_is():
    @checked
    def fails(x: int) -> None:
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        fails(3)


def test_fields_of_settings():
    assert message(GenerationSettings, guidence=1.0) == (
        "GenerationSettings has no field 'guidence': did you mean 'guidance'?"
    )
    assert "did you mean 'block_size'?" in message(JacobiSettings, blocksize=3)
    assert "did you mean 'tolerance'?" in message(RollingSettings, tolerence=3)

    assert message(GenerationSettings, guidance="x") == "GenerationSettings: guidance must be a number, not 'x'"
    assert GenerationSettings(size=[8, 8]) == GenerationSettings(size=(8, 8))

    @checked_class
    @dataclass(frozen=True)
    class Pair:
        x: int
        y: int = 2

    assert Pair(1) == Pair(1, 2) == Pair(x=1, y=2)


def test_sizes_as_lists(latent_flow, pixel_flow):
    image = smooth_images(1)[0]
    assert latent_flow.generate("a", seed=1, size=[8, 8]).images[0].size == (8, 8)
    assert latent_flow.vary(image, size=[8, 8]).images[0].size == (8, 8)
    assert latent_flow.score(image, size=[8, 8])[0].nll == latent_flow.score(image, size=(8, 8))[0].nll
    assert pixel_flow.score(image, size=list(pixel_flow.size))


def test_public_names():
    assert set(mlx_starflow.__all__) <= set(dir(mlx_starflow))
    assert all(getattr(mlx_starflow, name).__doc__ for name in mlx_starflow.__all__ if not name.startswith("__"))
    stub = (Path(mlx_starflow.__file__).parent / "__init__.pyi").read_text()
    assert all(f" as {name}\n" in stub for name in mlx_starflow.__all__ if not name.startswith("__"))


METHODS = "generate stream best_of score prompt_fit classify encode decode inpaint reprompt vary interpolate".split()


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_a_model(latent_flow, name):
    method = getattr(latent_flow, name)
    assert method.__doc__
    signature = inspect.signature(method)
    assert not any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in signature.parameters.values())
    assert {"progress", "callback"} <= set(signature.parameters)
    assert "did you mean 'callback'?" in message(method, calback=print)
    assert f"{name}: " in message(method) and "must be given" in message(method)


def test_mistakes_before_a_model_is_there():
    assert "did you mean 'dtype'?" in message(load, "demo", dtyp="float32")
    assert "must be a path, not 3" in message(load, 3)
    assert "adapters must be a list of (a path, a number)" in message(load, "demo", adapters=["x"])
