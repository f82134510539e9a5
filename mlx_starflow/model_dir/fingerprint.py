"""What ties files to the weights that they were made for.

Sampling plans, calibration statistics and adapters keep the fingerprint of their model, and so do quantized copies, in
a file of their own. Where adapters are part of the weights, `config.json` says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import exists, inside, read_json
from mlx_starflow.model_dir.files import ORIGIN_FILE, load_weights, read_config

FUSED = "fused"
"""Entry of a flow's `config.json`: digests and strengths of the adapters that are part of its weights."""


def fingerprint(directory: Path, config: Mapping[str, Any] | None = None) -> str:
    """Tells a model's weights from others by the layers that every training changes and no quantization touches.

    Adapters do not change these: those that are fused into the weights count as `config.json` names them.

    Args:
        config: what `config.json` holds, where it has been read already.
    """
    digest = hashlib.sha256()
    for name, array in sorted(load_weights(directory).items()):
        if ".proj_out." in name:
            digest.update(name.encode())
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    if fused := (read_config(directory) if config is None else config).get(FUSED):
        digest.update(json.dumps(fused, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def made_of(directory: Path, name: str | Path) -> bytes:
    """The file of a quantized copy that says of which model, and of which weights of it, it was made."""
    return (json.dumps({"model": str(name), "fingerprint": fingerprint(directory)}, indent=2) + "\n").encode()


def read_made_of(directory: Path) -> tuple[str, str] | None:
    """The model that a quantized copy was made of, and the fingerprint of its weights then; None of other models.

    Quantizing keeps the fingerprint: a file that names another one was left by a copy that is not there any more.

    Raises:
        StarflowError: the file is damaged.
    """
    path = directory / ORIGIN_FILE
    if not exists(path):
        return None
    found = read_json(inside(directory, ORIGIN_FILE))
    name, mark = found.get("model"), found.get("fingerprint")
    if not isinstance(name, str) or not isinstance(mark, str):
        raise StarflowError(f"{path} is damaged: delete it")
    return (name, mark) if mark == fingerprint(directory) else None
