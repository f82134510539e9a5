"""Writing, spoiling and comparing model directories of tiny flows."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from helpers.tiny_model import tiny_flow
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.starflow import STARFlow

WIDE = {"channels": 64, "head_dim": 16, "txt_dim": 64, "txt_size": 4}


def wide_flow(**changes: object) -> STARFlow:
    """Wide enough to be quantized."""
    return tiny_flow(**{**WIDE, **changes})


def config_of(flow: STARFlow, **more: object) -> dict[str, object]:
    return {"model_type": "starflow", **flow.config.to_dict(), **more}


def save_flow(directory: Path, flow: STARFlow | None = None, **options: object) -> Path:
    flow = flow or tiny_flow()
    return save_model(directory, parameters(flow), config_of(flow), **options)


def same(first: dict[str, mx.array], second: dict[str, mx.array]) -> bool:
    return first.keys() == second.keys() and all(mx.array_equal(first[name], second[name]).item() for name in first)


def message(function, *args, **options) -> str:
    with pytest.raises(StarflowError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(directory: Path, **changes: object) -> None:
    config = read_config(directory) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(directory: Path, **changes: mx.array | None) -> None:
    weights = {name: mx.array(w) for name, w in load_weights(directory).items()}
    weights |= {name.replace("__", "."): value for name, value in changes.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), {n: w for n, w in weights.items() if w is not None})
