"""The precisions that weights may have. These are names and numbers alone: listing them needs no MLX."""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")
"""What `--dtype` takes."""

MIXED = "mixed"

QUANTIZATIONS = {
    "8": ("affine", 8, 64),
    "6": ("affine", 6, 64),
    "4": ("affine", 4, 64),
    "mxfp8": ("mxfp8", 8, 32),
    "mxfp4": ("mxfp4", 4, 32),
    "nvfp4": ("nvfp4", 4, 16),
    MIXED: ("affine", 4, 64),
}
"""What `--quantize` takes: MLX's mode, bits a weight, and how many weights share a scale.

"mixed" gives the layers of a flow's shallow blocks `SHALLOW_BITS` instead. Shallow blocks see the data itself and
predict it sharply: an error of mu weighs 1/sigma^2 in the likelihood. They hold less than a third of the weights, and
nearly all of what plain 4 bits lose; examples/reports/quantization.py measures it.
"""
