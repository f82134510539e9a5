"""The way from one picture to another through the noise that they come from, as an animation.

python examples/interpolation.py way.webp
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mlx_starflow import load
from mlx_starflow.media.images import save_animation

target = Path(sys.argv[1] if len(sys.argv) > 1 else "way.webp")
prompts = ("a red heart", "a green apple on a blue background")
pipe = load("demo")
first, second = pipe.generate(prompts, seed=1).images

way = pipe.interpolate(first, second, prompts, [step / 4 for step in range(5)])
save_animation(way.images, target)

# Both ends are the pictures, as the autoencoder gives them back.
lost = np.abs(np.asarray(way.images[0], float) - np.asarray(first)).mean()
print(f"{target}: {len(way.images)} pictures; the first differs from its original by {lost:.1f} of 255 levels")
