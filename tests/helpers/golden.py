"""The golden cases of tests/data, made by the official PyTorch code: a flow with its weights, and arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import yaml

from helpers.golden_files import golden_case
from helpers.paths import DATA
from mlx_starflow.convert.pth import read_checkpoint
from mlx_starflow.models import itarflow, starflow, tarflow
from mlx_starflow.sampling import JacobiSettings

EXACT = JacobiSettings(threshold=1e-9)
STARFLOW: dict[str, dict[str, object]] = {
    "reverse": {},
    "reverse_of_z": {},
    "reverse_cfg": {"guidance": 2.5},
    "reverse_attn_temp_0.8": {"attn_temp": 0.8},
    "jacobi": {"method": EXACT},
    "jacobi_cfg": {"method": EXACT, "guidance": 2.5},
    "jacobi_cfg_th1e-3": {"method": JacobiSettings(threshold=1e-3), "guidance": 2.5},
}
"""What each kind of array was made with; the pretrained language model's case names no guidance, and was given 2."""

TARFLOW: dict[str, dict[str, object]] = {
    "reverse": {},
    "reverse_cfg": {"guidance": 1.5},
    "reverse_cfg_annealed": {"guidance": 1.5, "annealed_guidance": True},
    "reverse_cfg_b": {"guidance": 1.5, "guidance_target": "b"},
    "reverse_cfg_attn_temp_0.7": {"guidance": 0.8, "attn_temp": 0.7},
}

ITARFLOW: dict[str, dict[str, object]] = {
    "reverse_t0.3": {},
    "reverse_t0.3_cfg1.5": {"guidance": 1.5},
    "reverse_t0.3_cfg0.8_attn_temp_0.7": {"guidance": 0.8, "attn_temp": 0.7},
    "reverse_t0.3_cfg1.5_annealed_top1": {"guidance": 1.5, "annealed_guidance": True, "guided_blocks": 1},
    "reverse_t0.3_cfg1.5_annealed_starflow": {
        "guidance": 1.5, "annealed_guidance": True, "guided_blocks": 1, "guidance_mode": "starflow",
    },
}  # fmt: skip
"""The release's code for STARFlow's rule takes, by the shapes of its arrays, the first sample's scales for the means of
all others; with ours the first sample alone can agree, and test_sampler.py compares the others by that rule."""


@dataclass
class Golden:
    """One case: the flow with its weights, and the arrays, pictures and latents channels last."""

    flow: starflow.STARFlow | tarflow.TarFlow | itarflow.ITarFlow
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


@cache
def load_golden(case: str, dtype: mx.Dtype = mx.float32) -> Golden:
    """A case of tests/data with its weights cast to `dtype`. Each is loaded once; do not change its flow."""
    config = yaml.safe_load((DATA / case / "config.yaml").read_text())
    checkpoint = read_checkpoint(golden_case(case) / "model.pth")
    weights = {name: checkpoint.mx(name) for name in checkpoint}
    flow: starflow.STARFlow | tarflow.TarFlow | itarflow.ITarFlow
    if case.startswith("tarflow"):
        flow = tarflow.TarFlow(tarflow.TarFlowConfig.from_official(config))
        weights = tarflow.sanitize(weights)
    elif case.startswith("itarflow"):
        flow = itarflow.ITarFlow(itarflow.ITarFlowConfig.from_official(config))
        weights = itarflow.sanitize(weights)
    else:
        flow = starflow.STARFlow(starflow.FlowConfig.from_official(config))
        weights = starflow.sanitize(weights)
    flow.load_weights([(name, value.astype(dtype)) for name, value in weights.items()], strict=True)
    mx.eval(flow.parameters())
    arrays = {name: np.array(value) for name, value in mx.load(str(DATA / case / "golden.safetensors")).items()}
    # The release's latents and pictures are channels first; `output.i` is not.
    if case.startswith("itarflow") and "y" in arrays:
        arrays["y"] = arrays["y"].astype(np.int32)
    arrays = {
        name: np.moveaxis(value, -3, -1) if value.ndim > 3 and not ("output" in name or "logdet" in name) else value
        for name, value in arrays.items()
    }
    return Golden(flow, arrays)
