"""Pictures of scenes, 128x128: cut-out emoji with soft shadows on painted backgrounds, made as they are needed.

The objects are Microsoft's Fluent emoji in 3-D style, found by emojibase's labels (see `emoji.py`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from emoji import NAMES, PICTURES, labels
from emoji import fetch as fetch_package
from PIL import Image, ImageFilter
from scene_words import COLOURS, PLACES, HeldOut, Scene, draw_background, objects

SIZE = 128
SPRITE = 128


def fetch(folder: Path) -> None:
    """Write `sprites.npz` into a data folder, unless it is there: all objects first, then other emoji."""
    if (folder / "sprites.npz").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        assets = fetch_package(PICTURES, Path(scratch)) / "assets"
        names = fetch_package(NAMES, Path(scratch))
        stems = labels(names, {path.stem for path in assets.glob("*.webp")})
        things = {thing.name: stems.pop(thing.label.lower()) for thing in objects().values()}
        sprites = [cut_out(Image.open(assets / f"{stem}.webp")) for stem in (*things.values(), *stems.values())]
    unfinished = folder / "unfinished.npz"
    np.savez_compressed(unfinished, names=np.array(list(things)), sprites=np.stack(sprites))
    unfinished.rename(folder / "sprites.npz")


def cut_out(picture: Image.Image) -> np.ndarray:
    """What is visible of a picture, in the middle of a square whose side is its longer one, uint8 `[S, S, 4]`."""
    picture = picture.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    square = Image.new("RGBA", (max(picture.size),) * 2)
    square.paste(picture, tuple((max(picture.size) - side) // 2 for side in picture.size))
    # Colours of invisible pixels would bleed in: PIL multiplies them by their alpha first.
    return np.asarray(square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))


PLACES_AND_SIDES = {
    "one": ((64, 65, 84),),
    "beside": ((34, 66, 58), (94, 66, 58)),
    "above": ((64, 34, 56), (64, 94, 56)),
    "two": ((34, 66, 56), (94, 66, 56)),
    "three": ((64, 34, 52), (34, 93, 52), (94, 93, 52)),
}
_SIDES = {"small": 44, "normal": 84, "big": 114}


class Renderer:
    """Draws scenes with the sprites of a data folder, the same picture for the same scene and generator."""

    def __init__(self, folder: Path):
        fetch(folder)
        with np.load(folder / "sprites.npz") as stored:
            self.names = stored["names"].tolist()
            sprites = stored["sprites"]
        if self.names != list(objects()):
            raise SystemExit(f"{folder} holds sprites of another list of objects: remove {folder}/sprites.npz")
        self.sprites = [Image.fromarray(sprite) for sprite in sprites]
        self.index = {name: i for i, name in enumerate(self.names)}
        hidden = {self.index[name] for name in HeldOut.read().objects}
        self.allowed = [i for i in range(len(self.sprites)) if i not in hidden]
        self.shadows = [_shadow(sprite) for sprite in self.sprites]

    def render(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The picture of a scene, uint8 `[128, 128, 3]`; places, sizes and shades vary a little."""
        sprites = [self.index[name] for name in scene.objects]
        if len(sprites) < scene.count:
            sprites = sprites * scene.count
        spots = PLACES_AND_SIDES[scene.layout]
        if scene.layout == "one":
            spots = ((64, 65, _SIDES[scene.size]),)
        return self.compose(paint(scene.background, rng), sprites, spots, rng)

    def render_any(self, rng: np.random.Generator) -> np.ndarray:
        """A picture of one or two emoji of any kind, anywhere, for the autoencoder; never of a held-out object."""
        count = 1 + int(rng.random() < 0.4)
        sides = rng.uniform(40, 124 if count == 1 else 80, count)
        spots = tuple((*rng.uniform(side / 2, SIZE - side / 2, 2), side) for side in sides)
        return self.compose(paint(draw_background(rng), rng), rng.choice(self.allowed, count).tolist(), spots, rng)

    def compose(self, picture: Image.Image, sprites: list[int], spots: tuple, rng: np.random.Generator) -> np.ndarray:
        for index, (x, y, side) in zip(sprites, spots, strict=True):
            side = round(side * rng.uniform(0.94, 1.05))
            left, top = (round(c + rng.uniform(-3, 3) - side / 2) for c in (x, y))
            left, top = (min(max(c, 2), SIZE - 2 - side) for c in (left, top))
            shadow = self.shadows[index].resize((side + side // 4,) * 2, Image.Resampling.BILINEAR)
            picture.paste((20, 20, 40), (left - side // 8, top - side // 8 + max(side // 24, 2)), shadow)
            sprite = self.sprites[index].resize((side, side), Image.Resampling.HAMMING)
            picture.paste(sprite, (left, top), sprite)
        return np.asarray(picture)


def _shadow(sprite: Image.Image) -> Image.Image:
    """A soft shadow of a sprite, with a margin of an eighth, 80x80."""
    wide = Image.new("L", (80, 80))
    wide.paste(sprite.getchannel("A").resize((64, 64), Image.Resampling.BOX), (8, 8))
    return wide.filter(ImageFilter.GaussianBlur(2.5)).point(lambda a: round(0.3 * a))


_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1)


def paint(background: str, rng: np.random.Generator) -> Image.Image:
    """An empty background, 128x128."""
    if not background:
        hue, other = rng.random(2)
        pale = [_pale(h) for h in (hue, hue + 0.15 * (other - 0.5))]
        return _picture(_blend(pale[0], pale[1], _Y))
    if background in PLACES:
        return _picture(_paint_place(background, rng))
    colours = [np.array(COLOURS[name], np.float32) * rng.uniform(0.93, 1.04) for name in background.split(">")]
    if len(colours) == 1:
        # A touch darker below, so that it looks like a wall in light.
        return _picture(colours[0] * (1.03 - 0.08 * _Y[..., None]))
    return _picture(_blend(colours[0], colours[1], _Y))


def _pale(hue: float) -> np.ndarray:
    angles = 2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3]))
    return (226 + 22 * np.cos(angles)).astype(np.float32)


def _blend(a: object, b: object, t: np.ndarray) -> np.ndarray:
    return np.asarray(a, np.float32) + (np.asarray(b, np.float32) - np.asarray(a, np.float32)) * t[..., None]


def _picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _dots(
    values: np.ndarray, rng: np.random.Generator, count: int, colour: tuple, radius: float, bottom: float
) -> None:
    """Soft round dots above `bottom` (0..1): stars, flakes, bubbles; always the same ones, moved a little together.

    Dots anywhere would be noise that a small model spends its latents on.
    """
    pattern, moved = np.random.default_rng(count), rng.uniform(-2, 2, 2)
    for _ in range(count):
        x, y = (pattern.uniform(6, side - 7) + move for side, move in zip((SIZE, bottom * SIZE), moved, strict=True))
        r = radius * pattern.uniform(0.7, 1.3)
        ys, xs = slice(max(int(y - r - 1), 0), int(y + r + 3)), slice(max(int(x - r - 1), 0), int(x + r + 3))
        distance = np.hypot(_Y[ys, xs] * (SIZE - 1) - y, _X[ys, xs] * (SIZE - 1) - x)
        alpha = np.clip(r + 0.5 - distance, 0, 1)[..., None]
        values[ys, xs] += (np.array(colour, np.float32) - values[ys, xs]) * alpha


def _paint_place(place: str, rng: np.random.Generator) -> np.ndarray:
    light = rng.uniform(0.95, 1.04)
    horizon = {"grass": 0.6, "beach": 0.66, "snow": 0.62, "table": 0.58, "night": 0.78}.get(place, 1.0)
    edge = horizon + rng.uniform(-0.02, 0.02) + 0.015 * np.sin(2 * np.pi * (_X + 0.2 * rng.random()))
    if place in ("table", "beach"):
        edge = horizon + np.zeros_like(_X)
    below = np.clip((_Y - edge) * SIZE + 0.5, 0, 1)
    depth = np.clip((_Y - horizon) / max(1 - horizon, 1e-3), 0, 1)
    if place == "grass":
        values = _mix(
            _blend((110, 190, 250), (205, 236, 255), _Y / horizon), _blend((120, 200, 80), (64, 150, 56), depth), below
        )
    elif place == "beach":
        sky = _blend((120, 205, 250), (214, 242, 255), _Y / 0.45)
        sea = _blend((40, 150, 200), (90, 205, 215), np.clip((_Y - 0.45) / 0.21, 0, 1))
        values = _mix(sky, sea, np.clip((_Y - 0.45) * SIZE + 0.5, 0, 1))
        values = _mix(values, _blend((250, 226, 164), (232, 196, 126), depth), below)
    elif place == "snow":
        values = _mix(
            _blend((150, 176, 206), (202, 218, 234), _Y / horizon),
            _blend((250, 252, 255), (220, 232, 246), depth),
            below,
        )
        _dots(values, rng, 22, (255, 255, 255), 1.7, 1.0)
    elif place == "night":
        values = _mix(
            _blend((12, 16, 48), (44, 52, 110), _Y / horizon), _blend((26, 44, 46), (14, 26, 30), depth), below
        )
        _dots(values, rng, 21, (255, 250, 214), 1.1, 0.78)
    elif place == "water":
        values = _blend((52, 170, 220), (8, 58, 128), _Y)
        _dots(values, rng, 12, (160, 222, 246), 2.4, 1.0)
    elif place == "sunset":
        upper, lower = (
            _blend((92, 60, 140), (240, 110, 100), _Y / 0.5),
            _blend((240, 110, 100), (255, 200, 90), (_Y - 0.5) / 0.3),
        )
        values = np.where(_Y[..., None] < 0.5, upper, lower)
        values = _mix(values, _blend((70, 46, 90), (44, 28, 66), (_Y - 0.8) / 0.2), np.clip((_Y - 0.8) * SIZE, 0, 1))
    elif place == "table":
        values = _mix(
            _blend((240, 230, 214), (228, 214, 196), _Y / horizon), _blend((196, 138, 84), (158, 102, 58), depth), below
        )
        grain = 5 * np.sin(_Y * 90 + 2 * np.sin(_X * 5 + 0.5 * rng.random()))
        values += (grain * below)[..., None]
    else:
        values = _blend((92, 104, 124), (150, 160, 174), _Y)
        phase = 0.04 * rng.random()
        streaks = ((_X * 9 + _Y * 2.2 + phase) % 1 < 0.09) & (
            (_Y * 6 + np.floor(_X * 9 + _Y * 2.2 + phase) * 0.37) % 1 < 0.55
        )
        values = _mix(values, values + 36, streaks.astype(np.float32))
    return values * light


def _mix(a: np.ndarray, b: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return a + (b - a) * alpha[..., None]
