"""Prepare the embedded model's training pictures: 3-D emoji with their names.

    python examples/demo_data.py data/emoji

Fetches two npm packages (with `npm pack`): the pictures are Microsoft's Fluent emoji in 3-D style (MIT licence,
Copyright (c) Microsoft Corporation), the names and tags are emojibase's (MIT licence, Copyright (c) Miles Johnson).
Writes an image folder: pictures of 128x128 on white, and `metadata.jsonl` with `file_name`, `text` (the usual name),
`captions` (other names), `tags` and `split`: `train`, `held_out` (20 concepts that neither network ever sees) or
`autoencoder` (only the autoencoder is trained on them: people, hands, flags, signs and skin tones).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "emojibase-data@17.0.0"
SIZE = 128

# Groups and subgroups of emojibase whose pictures mean little as pictures, or show people.
LEFT_OUT_GROUPS = {"people-body", "flags", "symbols", "component"}
LEFT_OUT_SUBGROUPS = {"time", "alphanum", "arrow"}
KEPT_SUBGROUPS = {"geometric"}

# What people call these things when emojibase's name is not the usual word.
USUAL_NAMES = {
    "pizza": ["slice of pizza", "pizza slice"],
    "automobile": ["car", "red car"],
    "dog face": ["dog head", "face of a dog"],
    "cat face": ["cat head", "face of a cat"],
    "locomotive": ["steam train", "train engine"],
    "doughnut": ["donut"],
    "honeybee": ["bee"],
    "lady beetle": ["ladybug", "ladybird"],
    "ear of corn": ["corn", "corn on the cob"],
    "hot beverage": ["cup of coffee", "coffee", "cup of tea"],
    "beer mug": ["beer", "glass of beer"],
    "wine glass": ["glass of wine", "red wine"],
    "french fries": ["fries", "chips"],
    "ice cream": ["bowl of ice cream"],
    "soft ice cream": ["ice cream cone"],
    "cheese wedge": ["cheese", "piece of cheese"],
    "evergreen tree": ["fir tree", "pine tree"],
    "deciduous tree": ["tree", "green tree"],
    "high voltage": ["lightning", "lightning bolt"],
    "droplet": ["drop of water", "water drop"],
    "oncoming automobile": ["car from the front"],
    "airplane": ["aeroplane", "plane"],
    "flying saucer": ["ufo"],
    "wrapped gift": ["gift", "present"],
    "light bulb": ["bulb", "lamp"],
    "mobile phone": ["smartphone", "phone"],
    "laptop": ["computer", "notebook computer"],
    "american football": ["football"],
    "soccer ball": ["ball", "black and white ball"],
    "snowman without snow": ["snowman"],
    "hamburger": ["burger", "cheeseburger"],
    "grinning face": ["smiley", "happy face"],
    "T-Rex": ["dinosaur", "tyrannosaurus"],
    "baby chick": ["chick"],
    "mouse face": ["mouse head"],
    "spouting whale": ["blue whale"],
    "gem stone": ["diamond", "gem"],
    "red heart": ["heart"],
    "cooking": ["fried egg", "egg in a pan"],
    "watermelon": ["slice of watermelon"],
    "shortcake": ["slice of cake", "piece of cake"],
    "birthday cake": ["cake", "cake with candles"],
    "sailboat": ["sailing boat"],
    "glowing star": ["shining star"],
    "star": ["yellow star"],
    "crescent moon": ["moon"],
    "rose": ["red rose"],
    "tulip": ["pink tulip"],
    "fish": ["blue fish"],
    "rocket": ["space rocket", "spaceship"],
    "guitar": ["electric guitar"],
    "crown": ["golden crown"],
    "cactus": ["green cactus"],
    "banana": ["yellow banana"],
    "cloud": ["white cloud"],
}

# Never held out: the README shows them.
SHOWN = {
    *[
        "red apple",
        "pizza",
        "grinning face",
        "cat face",
        "dog face",
        "red heart",
        "purple heart",
        "rocket",
        "sun",
        "rainbow",
    ],
    *[
        "strawberry",
        "banana",
        "hamburger",
        "birthday cake",
        "octopus",
        "fish",
        "tulip",
        "cactus",
        "automobile",
        "guitar",
    ],
    *["soccer ball", "cloud", "snowman", "snowman without snow", "crown", "locomotive"],
}


def fetch(package: str, into: Path) -> Path:
    """Download and unpack one npm package; returns its folder."""
    print(f"fetching {package}")
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=into, check=True, capture_output=True, text=True)
    archive = into / done.stdout.strip().splitlines()[-1]
    folder = into / archive.stem
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def on_white(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def concepts(names: Path, pictures: set[str]) -> dict[str, dict]:
    """File stem -> name, captions and tags of every concept the flow is trained or tested on."""
    data = json.loads((names / "en/data.json").read_text())
    messages = json.loads((names / "en/messages.json").read_text())
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
    found = {}
    for entry in data:
        group, subgroup = groups.get(entry.get("group")), subgroups.get(entry.get("subgroup"))
        if group is None or subgroup in LEFT_OUT_SUBGROUPS:
            continue
        if group in LEFT_OUT_GROUPS and subgroup not in KEPT_SUBGROUPS:
            continue
        code = entry["hexcode"].lower()
        stem = next((s for s in (code, code.replace("-fe0f", ""), code + "-fe0f") if s in pictures), None)
        if stem is not None:
            label = entry["label"]
            found[stem] = {
                "text": label.lower(),
                "captions": USUAL_NAMES.get(label, []),
                "tags": [tag.lower() for tag in entry.get("tags", [])],
                "subgroup": subgroup,
            }
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        assets = fetch(PICTURES, Path(scratch)) / "assets"
        names = fetch(NAMES, Path(scratch))
        stems = sorted(path.stem for path in assets.glob("*.webp"))
        known = concepts(names, set(stems))
        eligible = sorted(stem for stem, entry in known.items() if entry["text"] not in {s.lower() for s in SHOWN})
        held_out = set(random.Random(0).sample(eligible, 20))
        unfinished = out / "metadata.unfinished"
        with open(unfinished, "w") as lines:
            for stem in stems:
                on_white(assets / f"{stem}.webp").save(out / f"{stem}.png")
                entry = known.get(stem, {"text": "", "captions": [], "tags": [], "subgroup": ""})
                split = "held_out" if stem in held_out else "train" if stem in known else "autoencoder"
                lines.write(json.dumps({"file_name": f"{stem}.png", "split": split, **entry}) + "\n")
        unfinished.rename(out / "metadata.jsonl")
    print(f"{len(stems)} pictures, {len(known)} with captions, {len(held_out)} of them held out, in {out}")
    print("held out:", ", ".join(sorted(known[stem]["text"] for stem in held_out)))


if __name__ == "__main__":
    main()
