"""Scenes are the same for the same numbers, true to their captions, and what is held out never comes up in training."""

from __future__ import annotations

import itertools
import json
import re
import sys

import numpy as np
import pytest
from helpers.paths import EXAMPLES
from helpers.scenes import write_sprites
from PIL import Image

sys.path.insert(0, str(EXAMPLES))

import scene_words as words
from scene_data import Stream, main
from scene_pictures import Renderer

from mlx_starflow.media.image_folder import ImageFolder

NOTHING = words.HeldOut(frozenset(), frozenset(), frozenset(), frozenset())
MAGENTA, GREEN = (255, 0, 255), (0, 255, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sprites(tmp_path_factory.mktemp("scenes"), MAGENTA)


@pytest.fixture
def renderer(folder):
    return Renderer(folder)


def scenes(kind: str, count: int) -> list[words.Scene]:
    stream = Stream(None, 0, kind)
    return [stream[n].scene for n in range(count)]


def covered(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of a colour, `[n, 2]`."""
    return np.argwhere(np.abs(picture.astype(int) - colour).max(axis=-1) < 60)


def test_objects():
    things = words.objects()
    assert len(things) > 200 and set(things) >= words.SHOWN
    names = [name for thing in things.values() for name in {thing.name, *thing.others}]
    assert len(names) == len(set(names)), "a name means one object"
    assert len({thing.label for thing in things.values()}) == len(things)


def test_held_out_file_is_what_the_names_hash_to():
    assert json.loads(words.HELD_OUT_FILE.read_text()) == words.choose_held_out()


def test_held_out_shares():
    held_out = words.HeldOut.read()
    trained = len(words.objects()) - len(held_out.objects)
    assert len(held_out.objects) == 40 and not held_out.objects & words.SHOWN
    assert len(held_out.pairs) / (trained * (trained - 1) / 2) == pytest.approx(0.1, abs=0.01)
    assert len(held_out.backgrounds) / (trained * len(words.BACKGROUNDS)) == pytest.approx(0.1, abs=0.01)
    assert len(held_out.roles) / (trained * len(words.ROLES)) == pytest.approx(0.1, abs=0.02)


def test_training_never_shows_what_is_held_out():
    held_out = words.HeldOut.read()
    seen = set()
    for scene in scenes("train", 5000):
        assert not held_out.objects & set(scene.objects)
        for name in scene.objects:
            assert not held_out.backgrounds & {(name, background) for background in scene.backgrounds}
        assert not held_out.roles & set(zip(scene.objects, scene.roles, strict=False))
        assert tuple(sorted(scene.objects)) not in held_out.pairs
        seen |= set(scene.objects)
    assert seen == set(words.objects()) - held_out.objects


@pytest.mark.parametrize("kind", words.KINDS[1:])
def test_held_out_streams_are_held_out_for_one_reason(kind):
    held_out = words.HeldOut.read()
    assert all(held_out.kinds(scene) == {kind} for scene in scenes(kind, 200))


def test_a_sample_follows_from_its_number(renderer):
    for kind in words.KINDS:
        first, again = (Stream(renderer, 3, kind)[11] for _ in range(2))
        assert (first.scene, first.caption) == (again.scene, again.caption)
        assert np.array_equal(first.picture, again.picture)
        assert Stream(None, 3, kind)[11].caption == first.caption
    samples = list(itertools.islice(Stream(renderer, 3), 12))
    assert np.array_equal(samples[7].picture, Stream(renderer, 3)[7].picture)
    assert len({s.picture.tobytes() for s in samples}) == 12
    assert Stream(None, 3)[0].scene != Stream(None, 4)[0].scene


WORDINGS = {
    ("left", "right"): [
        r"(.+) to the left of (.+)", r"(.+) left of (.+)", r"(.+) next to (.+)", r"(.+) beside (.+)",
        r"(.+) on the left and (.+) on the right", r"(.+) and (.+)",
    ],
    ("right", "left"): [r"(.+) to the right of (.+)", r"(.+) right of (.+)"],
    ("top", "bottom"): [r"(.+) at the top and (.+) at the bottom", r"(.+) above (.+)", r"(.+) over (.+)"],
    ("bottom", "top"): [r"(.+) below (.+)", r"(.+) under (.+)"],
}  # fmt: skip
NAMES = {name: thing.name for thing in words.objects().values() for name in (thing.name, *thing.others)}
GROUND = re.compile(
    r",? ?(on|with|in front of)? ?(an?)? ?(?P<colour>" + "|".join(words.COLOURS) + r")( background)?$"
    r"| on a (gradient|background) from (?P<top>\w+) to (?P<bottom>\w+)$"
)


def read(caption: str) -> tuple[dict[str, str], str]:
    """What a caption says: the objects by place ("only" for one kind of thing), and the background."""
    background = ""
    for place, phrases in words.PLACES.items():
        for phrase in sorted(phrases, key=len, reverse=True):
            if caption.endswith(" " + phrase) or caption.startswith(phrase + ", "):
                background = place
                caption = caption.removesuffix(" " + phrase).removeprefix(phrase + ", ")
                break
    if not background and (match := GROUND.search(caption)):
        background = match["colour"] or f"{match['top']}>{match['bottom']}"
        caption = caption[: match.start()]
    for places, patterns in WORDINGS.items():
        for pattern in patterns:
            match = re.fullmatch(pattern, caption)
            found = [NAMES.get(re.sub("^an? ", "", part)) for part in match.groups()] if match else []
            if found and all(found):
                return dict(zip(places, found, strict=True)), background
    return {"only": caption}, background


def test_captions_say_what_the_scene_is():
    rng = np.random.default_rng(0)
    for number in range(1500):
        scene = words.draw_scene(np.random.default_rng([1, number]), NOTHING)
        text = words.caption(scene, rng)
        said, background = read(text)
        assert background == scene.background, text
        if scene.roles:
            assert said == dict(zip(scene.roles, scene.objects, strict=True)), text
            continue
        thing = words.objects()[scene.objects[0]]
        some = [words.plural(name) if scene.count > 1 else name for name in (thing.name, *thing.others)]
        amount = {1: "(an? )?", 2: "(two|2) ", 3: "(three|3) "}[scene.count]
        size = "|".join(words.SIZES[scene.size])
        assert re.fullmatch(rf"{amount}({size}) ?({'|'.join(map(re.escape, some))})", said["only"]), text


def test_pictures_have_the_layout_that_captions_speak_of(renderer):
    disc = Image.fromarray(np.asarray(renderer.sprites[0]) * np.uint8([0, 0, 0, 1]) + np.uint8([*GREEN, 0]))
    names = list(words.objects())
    renderer.sprites[1] = disc
    for layout, axis in (("beside", 1), ("above", 0)):
        for first, second, sign in ((0, 1, 1), (1, 0, -1)):
            scene = words.Scene(layout, (names[first], names[second]), "grey")
            for seed in range(5):
                picture = renderer.render(scene, np.random.default_rng(seed))
                middles = [covered(picture, colour).mean(axis=0) for colour in (MAGENTA, GREEN)]
                apart = sign * (middles[1] - middles[0])
                assert apart[axis] > 45 and abs(apart[1 - axis]) < 12


def test_sizes_and_counts(renderer):
    name = next(iter(words.objects()))
    areas = {}
    for size in words.SIZES:
        scene = words.Scene("one", (name,), "white", size)
        areas[size] = [len(covered(renderer.render(scene, np.random.default_rng(s)), MAGENTA)) for s in range(8)]
    assert max(areas["small"]) < 0.5 * min(areas["normal"]) and max(areas["normal"]) < 0.8 * min(areas["big"])
    assert len(set(areas["normal"])) > 1, "renders of one scene differ"
    single = np.mean(areas["normal"]) / 84**2
    for layout, side in (("two", 56), ("three", 52)):
        scene = words.Scene(layout, (name,), "white")
        area = len(covered(renderer.render(scene, np.random.default_rng(0)), MAGENTA))
        assert area == pytest.approx(scene.count * single * side**2, rel=0.15)


def test_backgrounds(renderer):
    corner = {}
    for background in words.BACKGROUNDS:
        scene = words.Scene("one", (next(iter(words.objects())),), background, "small")
        picture = renderer.render(scene, np.random.default_rng(0))
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        corner[background] = np.concatenate([picture[:20].mean(axis=(0, 1)), picture[-20:].mean(axis=(0, 1))])
        if background in words.COLOURS:
            assert np.abs(corner[background].reshape(2, 3) - words.COLOURS[background]).max() < 32
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(corner.values(), 2)) > 20


@pytest.mark.parametrize(
    ("name", "more"),
    [("dog", "dogs"), ("slice of pizza", "slices of pizza"), ("fox", "foxes"), ("puppy", "puppies"), ("key", "keys"),
     ("box of fries", "boxes of fries"), ("mouse", "mice"), ("tomato", "tomatoes"), ("snowman", "snowmen"),
     ("volcano", "volcanoes"), ("alien", "aliens"), ("bus", "buses"), ("pair of jeans", "pairs of jeans")],
)  # fmt: skip
def test_plural(name, more):
    assert words.plural(name) == more


def test_articles():
    assert [words.with_article(w) for w in ("apple", "unicorn", "ufo", "umbrella", "big owl")] == [
        *("an apple", "a unicorn", "a ufo", "an umbrella", "a big owl")
    ]


def test_sheet(folder, tmp_path, capsys):
    main([str(folder), "--sheet", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").size[0] == 6 * 134
    assert "40" in capsys.readouterr().out


def test_an_image_folder(folder, tmp_path):
    main([str(folder), "--pictures", str(tmp_path), "--count", "20"])
    train, held_out = (ImageFolder.read(tmp_path, size=128, splits=(split,)) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (20, len(words.KINDS) - 1)
    sample = Stream(Renderer(folder))[7]
    assert train.captions[7] == [sample.caption] and np.array_equal(train.images[7], sample.picture)
