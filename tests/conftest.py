"""Shared by all tests: the golden cases in tests/data, made by the official PyTorch code, and tiny random flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import mlx.core as mx
import numpy as np
import pytest
import yaml
from helpers.golden_files import golden_case
from helpers.paths import DATA
from mlx.utils import tree_flatten

from mlx_starflow import cpu
from mlx_starflow.convert.pth import read_checkpoint
from mlx_starflow.models import starflow, tarflow


@dataclass
class Golden:
    """One case: the flow with its weights, and the arrays, pictures and latents channels last."""

    flow: starflow.STARFlow | tarflow.TarFlow
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> mx.array:
        return mx.array(self.arrays[name])

    def get(self, name: str) -> mx.array | None:
        """The array, or None if the case has none of this name."""
        return self[name] if name in self.arrays else None

    def error(self, actual: mx.array, name: str) -> float:
        """Largest difference from the array `name`."""
        expected = self.arrays[name]
        actual = np.array(actual.astype(mx.float32))
        assert actual.shape == expected.shape
        return float(np.abs(actual - expected).max())

    def relative_error(self, actual: mx.array, name: str) -> float:
        """Largest difference, relative to the largest value of the array `name`."""
        return self.error(actual, name) / float(np.abs(self.arrays[name]).max())


def load_golden(case: str, dtype: mx.Dtype = mx.float32) -> Golden:
    """A case of tests/data with its weights cast to `dtype`."""
    config = yaml.safe_load((DATA / case / "config.yaml").read_text())
    checkpoint = read_checkpoint(golden_case(case) / "model.pth")
    weights = {name: checkpoint.mx(name) for name in checkpoint}
    flow: starflow.STARFlow | tarflow.TarFlow
    if case.startswith("tarflow"):
        flow = tarflow.TarFlow(tarflow.TarFlowConfig.from_official(config))
        weights = tarflow.sanitize(weights)
    else:
        flow = starflow.STARFlow(starflow.FlowConfig.from_official(config))
        weights = starflow.sanitize(weights)
    flow.load_weights([(name, value.astype(dtype)) for name, value in weights.items()], strict=True)
    mx.eval(flow.parameters())
    arrays = {name: np.array(value) for name, value in mx.load(str(DATA / case / "golden.safetensors")).items()}
    # The release's latents and pictures are channels first; `output.i` is not.
    arrays = {
        name: np.moveaxis(value, -3, -1) if value.ndim > 3 and not ("output" in name or "logdet" in name) else value
        for name, value in arrays.items()
    }
    return Golden(flow, arrays)


@pytest.fixture(scope="session")
def golden() -> Callable[..., Golden]:
    """`golden(case)` or `golden(case, mx.bfloat16)`: each is loaded once; do not change its flow."""
    return lru_cache(maxsize=None)(load_golden)


@dataclass
class Tiny:
    """A tiny flow with random weights, data for it, and its condition and null condition (None if it has none)."""

    flow: starflow.STARFlow | tarflow.TarFlow
    x: mx.array
    text: mx.array | None
    null_text: mx.array | None

    def noise(self, z: mx.array) -> mx.array:
        """`flow(x).z` as `sample` takes it."""
        return self.flow.standardize(z)


_STARFLOW = {
    "img_size": 4, "channel_size": 2, "patch_size": 1, "channels": 32, "layers_per_block": [1, 1, 1], "head_dim": 32,
    "txt_size": 3, "txt_dim": 6,
}  # fmt: skip
_TARFLOW = {"img_size": 4, "channel_size": 1, "patch_size": 2, "channels": 32, "blocks": 3, "layers_per_block": 1}
_LANGUAGE_MODEL = {
    "hf_style_rope": True, "use_swiglu": True, "use_qk_norm": True, "use_post_norm": True, "use_final_norm": True,
    "use_bias": False, "norm_type": "rms_norm", "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "channels": 16,
    "expansion": 2, "num_layers": 2, "use_proj_txt": False, "use_rope": True,
}  # fmt: skip
_RELEASED = {"use_softplus": True, "use_final_norm": True, "soft_clip": 4.0}

# One of every kind of flow: the scale's shape, the start token, order, patches, text, layers.
FAMILIES: dict[str, dict[str, object]] = {
    "softplus": {**_STARFLOW, **_RELEASED},
    "exp_all_text": {**_STARFLOW, "cond_top_only": False},
    "shifted": {**_STARFLOW, "sos": False, "seq_order": "R2L"},
    "shifted_softplus": {**_STARFLOW, **_RELEASED, "sos": False, "layers_per_block": [1, 2]},
    "reversed": {**_STARFLOW, **_RELEASED, "seq_order": "R2L"},
    "patches": {**_STARFLOW, **_RELEASED, "patch_size": 2, "img_size": 8, "channel_size": 1},
    "no_text": {**_STARFLOW, **_RELEASED, "txt_size": 0, "txt_dim": 0},
    "identity_block": {**_STARFLOW, **_RELEASED, "layers_per_block": [1, 0, 1]},
    "modern": {
        **_STARFLOW, **_RELEASED, "use_swiglu": True, "use_qk_norm": True, "use_post_norm": True, "use_bias": False,
        "norm_type": "rms_norm", "head_dim": 24, "num_heads": 2, "num_kv_heads": 1,
    },
    "language_model": {**_STARFLOW, **_RELEASED, "txt_dim": 16, "top_block": _LANGUAGE_MODEL},
    "frames": {
        **_STARFLOW, **_RELEASED, "top_block_channels": 64, "vid_size": "9:16", "temporal_causal": 2,
        "shallow_block_local": True, "learnable_self_denoiser": True, "conditional_denoiser": True,
        "denoiser_window": 2,
    },
    "tarflow": {**_TARFLOW, "head_dim": 16, "num_classes": 3},
    "tarflow_vp": {**_TARFLOW, "head_dim": 16, "nvp": False},
}  # fmt: skip


def make_tiny(family: str, batch: int = 2) -> Tiny:
    config = FAMILIES[family]
    rng = np.random.default_rng(crc32(family.encode()))

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    flow: starflow.STARFlow | tarflow.TarFlow
    text = null_text = None
    if family.startswith("tarflow"):
        flow = tarflow.TarFlow(tarflow.TarFlowConfig.from_dict(config))
        x = normal(batch, 4, 4, 1)
        if flow.config.num_classes:
            text = mx.array([2, *[-1] * (batch - 1)])
    else:
        flow = starflow.STARFlow(starflow.FlowConfig.from_dict(config))
        patch = flow.config.patch_size
        x = normal(batch, *([2] if flow.config.vid_size else []), 2 * patch, 3 * patch, flow.config.channel_size)
        if flow.config.txt_size:
            text, null_text = normal(batch, 3, flow.config.txt_dim), normal(1, 3, flow.config.txt_dim)
    weights = []
    for name, value in tree_flatten(flow.parameters()):
        noise = normal(*value.shape) * (value.shape[-1] ** -0.5 if value.ndim == 2 else 0.2)
        # Norm weights and the prior's variances lie about 1; outputs are kept small, so that flows stay well-behaved.
        if "proj_out" in name:
            noise = noise * (0.5 if config.get("soft_clip") else 0.15)
        weights.append((name, mx.exp(0.3 * normal(*value.shape)) if name == "var" else noise))
        if name.endswith("norm.weight") and flow.config.__dict__.get("norm_type") != "rms_norm":
            weights[-1] = (name, value + noise)
    flow.load_weights(weights, strict=True)
    mx.eval(flow.parameters())
    return Tiny(flow, x, text, null_text)


@pytest.fixture(params=list(FAMILIES))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """A tiny flow of each family; each test gets its own."""
    return make_tiny(request.param)


@pytest.fixture
def in_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling computes in MLX, as on a Mac, even where there is C++ for it."""
    monkeypatch.setattr(cpu, "has_fast_networks", lambda: False)


@pytest.fixture(scope="session")
def tiny_flow() -> Callable[..., Tiny]:
    """`tiny_flow(family)` or `tiny_flow(family, batch)`: a tiny flow of one family."""
    return make_tiny
