"""What weights that are fine-tuned are held in."""

from __future__ import annotations

import mlx.core as mx
from helpers.model_directories import write_image_model

from mlx_starflow import load_flow
from mlx_starflow.model_dir import weights
from mlx_starflow.models.flow import products_in
from mlx_starflow.training.finetuning.base import computed_dtype, held_dtype, load_base
from mlx_starflow.training.finetuning.config import FinetuneConfig


def test_on_a_gpu_nothing_is_trained_in_float16(monkeypatch, tmp_path):
    """Whose range gradients leave: not even where flows are sampled in it."""
    monkeypatch.setattr(weights, "device", lambda: "metal")
    directory = write_image_model(tmp_path / "model")
    assert products_in(load_flow(directory)) == mx.float16
    for kind, held in (("lora", mx.bfloat16), ("full", mx.float32)):
        config = FinetuneConfig(kind=kind)
        assert computed_dtype(config) == mx.bfloat16
        assert products_in(load_base(directory, None, held_dtype(config))) == held
