"""How likely pictures are under the flow, where they surprise it, and whether that is unusual.

python examples/scoring.py maps
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from mlx_starflow import load
from mlx_starflow.likelihood import CalibrationStatistics, heat_map

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
pipe = load("demo")
statistics = CalibrationStatistics.find(pipe.directory)
assert statistics is not None  # of the images that the embedded model was trained on

car = pipe.generate("a car on a yellow background", seed=1).images[0]
upside_down = car.rotate(180)
blank = Image.new("RGB", car.size, "white")
static = Image.effect_noise(car.size, 100).convert("RGB")
pictures = {"car": car, "car upside down": upside_down, "nothing": blank, "static": static}

scores = pipe.score(list(pictures.values()))
highest = max(score.surprise.max() for score in scores)
for (name, picture), score in zip(pictures.items(), scores, strict=True):
    deviation = statistics.typicality(score).deviation
    print(f"{name:<16}{score.nll:8.4f} +- {score.standard_error:.4f} nats per dimension, deviation {deviation:+.1f}")
    heat_map(picture, score.surprise, 0, highest).save(folder / f"{name.replace(' ', '-')}.png")

labels = [f"{thing} on a yellow background" for thing in ("a car", "a red apple", "a cat")]
result = pipe.classify([car], labels)
print(f"the car is taken for: {result.best[0]}, {result.margin[0]:.0f} nats ahead")
