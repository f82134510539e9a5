"""STARFlow in MLX: text to images by one autoregressive normalizing flow, with exact likelihood and inversion.

from mlx_starflow import load

pipe = load("demo")
pipe.generate("a fox to the left of a cactus at night", seed=7).save("fox.png")
"""

from __future__ import annotations

import os
from importlib import import_module

from mlx_starflow import cpu
from mlx_starflow.errors import Cancelled, StarflowError

__version__ = "0.1.0"
__all__ = [
    "Cancelled",
    "ClassPipeline",
    "GenerationResult",
    "GenerationSettings",
    "ImagePipeline",
    "Progress",
    "StarflowError",
    "TextPipeline",
    "Upscaler",
    "VideoPipeline",
    "__version__",
    "denoise",
    "load",
    "load_class_labels",
    "load_flow",
    "load_text",
    "load_video",
    "sample",
]

_HOMES = {
    "ClassPipeline": "pipelines",
    "GenerationResult": "pipelines",
    "GenerationSettings": "pipelines",
    "ImagePipeline": "pipelines",
    "Progress": "sampling",
    "TextPipeline": "pipelines",
    "Upscaler": "pipelines",
    "VideoPipeline": "pipelines",
    "denoise": "sampling",
    "load": "pipelines",
    "load_class_labels": "pipelines",
    "load_flow": "model_dir.directory",
    "load_text": "pipelines",
    "load_video": "pipelines",
    "sample": "sampling",
}

cpu.install()

# MLX reads this once, at its first product on a GPU. Its own default, TF32 where the GPU has it, keeps 10 bits of the
# mantissa of float32 factors; who wants that sets the variable to 1.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


def __getattr__(name: str) -> object:
    # Loaded on first use: `mlx-starflow --help` and converters need not wait for MLX. The stub beside this has types.
    if name in _HOMES:
        cpu.check()
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
