"""Pictures of a style that the embedded model has never seen, with captions, to fine-tune it on.

    python examples/style_data.py data/contrast                      # needs pip install resvg-py
    python examples/style_data.py data/twemoji --style twemoji
    python examples/style_data.py data/noto --style noto

Fetches two npm packages (with `npm pack`). contrast: Microsoft's Fluent emoji in black and white, "high contrast" (MIT
licence), as SVG. twemoji: flat emoji, graphics by Twitter and other contributors, CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/). noto: Google's Noto emoji, Apache 2.0. The names are emojibase's (MIT).
Writes an image folder: the objects of `scene_words.py`, each alone on white, as large as scenes show single things, and
`metadata.jsonl` with `file_name`, `text` and other `captions`.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

from emoji import NAMES, fetch, labels
from PIL import Image
from scene_pictures import PLACES_AND_SIDES, SIZE, cut_out
from scene_words import objects, with_article

STYLES = {
    "contrast": ("@iconify-json/fluent-emoji-high-contrast@1.2.6", ""),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
}


def on_white(picture: Image.Image) -> Image.Image:
    """What is visible of a picture, where a scene has a single thing."""
    ((x, y, side),) = PLACES_AND_SIDES["one"]
    thing = Image.fromarray(cut_out(picture)).resize((side, side), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", (SIZE, SIZE), "white")
    white.alpha_composite(thing, (x - side // 2, y - side // 2))
    return white.convert("RGB")


def drawings(package: Path) -> dict[str, Image.Image]:
    """The pictures of an icon package by their characters' codes."""
    import resvg_py

    icons = json.loads((package / "icons.json").read_text())["icons"]
    codes = json.loads((package / "chars.json").read_text())
    found = {}
    for code, name in codes.items():
        if name in icons:
            body = f'<g color="#000000">{icons[name]["body"]}</g>'
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
            png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE, height=4 * SIZE)
            found[code] = Image.open(io.BytesIO(bytes(png)))
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
        stems = labels(names, set(made) if made else {path.stem for path in pictures.glob("*.png")})
        lines = []
        for thing in objects().values():
            stem = stems.get(thing.label.lower())
            if stem is None:
                continue
            on_white(made[stem] if made else Image.open(pictures / f"{stem}.png")).save(args.out / f"{stem}.png")
            text, *others = (f"{with_article(name)} on a white background" for name in (thing.name, *thing.others))
            lines.append({"file_name": f"{stem}.png", "text": text, "captions": others})
    (args.out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} pictures with captions in {args.out}")


if __name__ == "__main__":
    main()
