"""The precisions that weights may have, and which of them is used unless one is asked for.

These are names and numbers alone: listing them needs no MLX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DTYPES = ("float32", "bfloat16", "float16")
"""What weights may be."""

AUTO = "auto"
"""What `--dtype` takes besides `DTYPES`: the choice of `automatic`."""

Device = Literal["cpu", "metal", "cuda"]
"""What MLX computes on."""


@dataclass(frozen=True)
class Precision:
    """What a network computes in.

    Attributes:
        dtype: of its weights; a flow's norms, residual stream and affine map are float32 in any case.
        fallback: the dtype that takes its place if a number leaves its range; None: there is none larger.
        why: the reasons, for people.
    """

    dtype: str
    fallback: str | None
    why: str


def automatic(device: Device, chip: int | None = None, *, quantized_flow: bool = False) -> Precision:
    """The precision of a network unless one is asked for; docs/precision.md has the measurements that it follows from.

    Args:
        device: what MLX computes on.
        chip: the generation of an Apple chip, 1 for an M1; None: another or an unknown one.
        quantized_flow: the network is a flow of pictures with quantized weights. (A video's keys and values take more
            memory than the weights: its flow is not asked to hold them in float32.)
    """
    if device == "cpu":
        return Precision("float32", None, "half precision is slower on a CPU")
    if quantized_flow:
        return Precision("float32", None, "packed weights are multiplied by float32 numbers as fast as by half ones")
    units = (
        "; chips before the M3 have no bfloat16 units" if device == "metal" and chip is not None and chip < 3 else ""
    )
    return Precision("float16", "bfloat16", f"its rounding is an eighth of bfloat16's at the same cost{units}")


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
