"""Paint the right half of a picture anew, so that it goes with the left half.

python examples/inpainting.py inpainted.png
"""

from __future__ import annotations

import sys

from mlx_starflow import load
from mlx_starflow.editing import read_mask
from mlx_starflow.media.images import grid

target = sys.argv[1] if len(sys.argv) > 1 else "inpainted.png"
prompt = "a red apple on a blue background"
pipe = load("demo")
picture = pipe.generate(prompt, seed=1).images[0]

mask = read_mask("64,0,64,128", picture.size)  # x, y, width, height; or a black-and-white picture
result = pipe.inpaint(picture, mask, prompt, images=2, seed=1)

hole = picture.copy()
hole.paste("lightgrey", mask=mask)
grid([picture, hole, *result.images], columns=4).save(target)
print(f"NLL from {result.nll[0].mean():.3f} to {result.nll[-1].mean():.3f} nats per dimension")
