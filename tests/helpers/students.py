"""Tiny students with random weights."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.flow import Flow
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.student import Student, StudentConfig


def student_config(flow: Flow, kind: str = "inverse", **changes: object) -> StudentConfig:
    """The config of a student of a tiny flow."""
    config, blocks = flow.config, [block for block in flow.blocks if not block.is_identity]
    text = isinstance(config, FlowConfig)
    values = {
        "channels": 32, "num_layers": 3, "head_dim": 16, "num_heads": 2, "num_kv_heads": 2, "norm_type": "rms_norm",
        "kind": kind, "teacher": "nobody", "layout": "starflow" if text else "tarflow",
        "channel_size": config.channel_size, "patch_size": config.patch_size, "side": 4,
        "scales": (1.0,) * (1 if kind == "matching" else len(blocks) + 1),
        "txt_dim": config.txt_dim if text and config.txt_size else 0,
        "num_classes": 0 if text else config.num_classes,
    }  # fmt: skip
    return StudentConfig(**{**values, **changes})


def tiny_student(flow: Flow, kind: str = "inverse", **changes: object) -> Student:
    """A student of a tiny flow that has learned nothing, and whose heads say something all the same."""
    student = Student(student_config(flow, kind, **changes))
    rng = np.random.default_rng(7)
    weights = {
        name: mx.array((0.3 * rng.standard_normal(value.shape)).astype(np.float32))
        for name, value in parameters(student).items()
    }
    student.load_weights(list(weights.items()))
    mx.eval(student.parameters())
    return student


def write_student(folder: Path, model: Path, kind: str = "inverse", **changes: object) -> Path:
    """A folder with such a student of a model."""
    student = tiny_student(load_flow(model), kind, **{"teacher": fingerprint(model), **changes})
    return save_model(folder, parameters(student), {"model_type": "student", **student.config.to_dict()})
