"""Pictures of a style that the embedded model has never seen, with their names, to fine-tune it on.

    python examples/style_data.py data/contrast                      # needs pip install resvg-py
    python examples/style_data.py data/twemoji --style twemoji
    python examples/style_data.py data/noto --style noto

Fetches two npm packages (with `npm pack`). contrast: Microsoft's Fluent emoji in black and white, "high contrast" (MIT
licence), as SVG. twemoji: flat emoji, graphics by Twitter and other contributors, CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/). noto: Google's Noto emoji, Apache 2.0. The names are emojibase's (MIT).
Writes an image folder: pictures of 64x64 on white, and `metadata.jsonl` with `file_name` and `text`, for the same
things that the embedded model knows the names of.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from demo_data import NAMES, concepts, fetch
from PIL import Image

STYLES = {
    "contrast": ("@iconify-json/fluent-emoji-high-contrast@1.2.6", ""),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
}
SIZE = 64


def on_white(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.size == (SIZE, SIZE) else picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def drawings(package: Path) -> dict[str, Image.Image]:
    """The pictures of an icon package, drawn on white, by their characters' codes."""
    import resvg_py

    icons = json.loads((package / "icons.json").read_text())["icons"]
    codes = json.loads((package / "chars.json").read_text())
    found = {}
    for code, name in codes.items():
        if name in icons:
            body = f'<g color="#000000">{icons[name]["body"]}</g>'
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
            png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=4 * SIZE, height=4 * SIZE)
            large = Image.open(io.BytesIO(bytes(png))).convert("RGB")
            found[code] = large.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--style", choices=STYLES, default="contrast")
    args = parser.parse_args(arguments)
    package, folder = STYLES[args.style]
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pictures = fetch(package, Path(scratch)) / folder
        names = fetch(NAMES, Path(scratch))
        made = drawings(pictures) if args.style == "contrast" else None
        stems = set(made) if made else {path.stem for path in pictures.glob("*.png")}
        known = concepts(names, stems)
        with open(args.out / "metadata.jsonl", "w") as lines:
            for stem, entry in sorted(known.items()):
                (made[stem] if made else on_white(pictures / f"{stem}.png")).save(args.out / f"{stem}.png")
                row = {"file_name": f"{stem}.png", "text": entry["text"]}
                lines.write(json.dumps({**row, "captions": entry["captions"]} if made else row) + "\n")
    print(f"{len(known)} pictures with captions in {args.out}")


if __name__ == "__main__":
    main()
