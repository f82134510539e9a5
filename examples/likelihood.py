"""What a flow knows and a diffusion model does not: how likely a picture is, and the noise it comes from.

python examples/likelihood.py "a slice of pizza"
"""

from __future__ import annotations

import math
import sys

import mlx.core as mx

from mlx_starflow import load, sample

prompt = sys.argv[1] if len(sys.argv) > 1 else "a slice of pizza"
pipe = load("demo")
# Keep the flow's own noise in the latents: it is the noisy latents that the likelihood is about.
latents = pipe.generate(prompt, seed=7, denoise=False).latents

for caption in (prompt, "a castle at night", ""):
    text = pipe.encode_prompts([caption])
    nll = pipe.flow(latents, text).nll().item() + 0.5 * math.log(2 * math.pi)
    print(f"{nll:8.4f} nats per dimension as {caption!r}")

text = pipe.encode_prompts([prompt])
noise = pipe.flow(latents, text).z
back = sample(pipe.flow, noise, text)
print(f"to noise and back: the largest difference is {mx.abs(back - latents).max().item():.1e}")
