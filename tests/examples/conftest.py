"""Emoji and their names as npm would bring them, so that nothing is fetched."""

from __future__ import annotations

import io
import json
import stat
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import EXAMPLES
from PIL import Image

sys.path.insert(0, str(EXAMPLES))

from scene_words import objects

NPM = """#!{python}
import shutil, sys
name = sys.argv[-1].rpartition("@")[0].replace("/", "-").lstrip("@")
shutil.copy("{folder}/" + name + ".tgz", ".")
print(name + ".tgz")
"""


def image(number: int, kind: str) -> bytes:
    """A blot of a few colours."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="session")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A program `npm` that knows the packages which the examples fetch: the objects of scenes, a sheep and a sign."""
    folder = tmp_path_factory.mktemp("npm")
    names = [*(thing.label for thing in objects().values()), "sheep"]
    codes = {f"1f{400 + number}": name for number, name in enumerate(names)}
    entries = [
        {"hexcode": code.upper(), "label": name, "group": 0, "subgroup": number % 2}
        for number, (code, name) in enumerate(codes.items())
    ]
    entries.append({"hexcode": "2795", "label": "plus", "group": 1, "subgroup": 2})
    messages = {
        "groups": [{"order": 0, "key": "animals-nature"}, {"order": 1, "key": "symbols"}],
        "subgroups": [{"order": n, "key": key} for n, key in enumerate(["animal-mammal", "food-fruit", "math"])],
    }
    stems = [*codes, "2795"]
    pack(
        folder / "emojibase-data.tgz",
        {"en/data.json": json.dumps(entries).encode(), "en/messages.json": json.dumps(messages).encode()},
    )
    pack(
        folder / "lobehub-fluent-emoji-3d.tgz",
        {f"assets/{stem}.webp": image(n, "webp") for n, stem in enumerate(stems)},
    )
    pack(
        folder / "emoji-datasource-twitter.tgz",
        {f"img/twitter/64/{stem}.png": image(n, "png") for n, stem in enumerate(stems)},
    )
    program = folder / "npm"
    program.write_text(NPM.format(python=sys.executable, folder=folder))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=":")
        yield
