"""What ties files to the weights that they were made for.

Sampling plans, calibration statistics and adapters keep the fingerprint of their model. Of a flow that was made of
another, its `config.json` says so: `made_of` in a quantized copy, `fused` where adapters are part of the weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.model_dir.files import load_weights, read_config

MADE_OF, FUSED = "made_of", "fused"
"""Entries of a flow's `config.json`: the model that a quantized copy is of, and what `fused_entry` gives."""


def fingerprint(directory: Path) -> str:
    """Tells a model's weights from others by the layers that every training changes and no quantization touches.

    Adapters do not change these: those that are fused into the weights count as `config.json` names them.
    """
    digest = hashlib.sha256()
    for name, array in sorted(load_weights(directory).items()):
        if ".proj_out." in name:
            digest.update(name.encode())
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    if fused := read_config(directory).get(FUSED):
        digest.update(json.dumps(fused, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def made_of(directory: Path, name: str | Path) -> dict[str, str]:
    """The entry of a copy's config that says of which model, and of which weights of it, it was made."""
    return {"model": str(name), "fingerprint": fingerprint(directory)}
