"""Pictures of a style that the embedded model has never seen, with their names, to fine-tune it on.

    python examples/style_data.py data/twemoji
    python examples/style_data.py data/noto --style noto

Fetches two npm packages (with `npm pack`). twemoji: flat emoji, graphics by Twitter and other contributors, CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/). noto: Google's Noto emoji, Apache 2.0. The names are emojibase's (MIT).
Writes an image folder: pictures of 64x64 on white, and `metadata.jsonl` with `file_name` and `text`, for the same
things that the embedded model knows the names of.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from demo_data import NAMES, concepts, fetch
from PIL import Image

STYLES = {
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
}
SIZE = 64


def on_white(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.size == (SIZE, SIZE) else picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--style", choices=STYLES, default="twemoji")
    args = parser.parse_args()
    package, folder = STYLES[args.style]
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pictures = fetch(package, Path(scratch)) / folder
        names = fetch(NAMES, Path(scratch))
        known = concepts(names, {path.stem for path in pictures.glob("*.png")})
        with open(args.out / "metadata.jsonl", "w") as lines:
            for stem, entry in sorted(known.items()):
                on_white(pictures / f"{stem}.png").save(args.out / f"{stem}.png")
                lines.write(json.dumps({"file_name": f"{stem}.png", "text": entry["text"]}) + "\n")
    print(f"{len(known)} pictures with captions in {args.out}")


if __name__ == "__main__":
    main()
