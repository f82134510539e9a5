"""The PyTorch reference, loaded from official checkpoints, against the official code's arrays in tests/data."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.golden import ITARFLOW, STARFLOW, TARFLOW
from helpers.golden_files import golden_case
from helpers.paths import DATA
from helpers.torch_reference import DEVICES, difference, relative

from mlx_starflow.sampling import JacobiSettings

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]

IMAGE_CASES = ["t2i", "t2i_patch2", "t2i_all_text", "t2i_shifted", "t2i_identity_block", "t2i_modern", "pretrained_lm"]
TARFLOW_CASES = ["tarflow", "tarflow_vp"]


class Case:
    """A flow in PyTorch and the arrays of its case, on a device and channels last."""

    def __init__(self, name: str, device: str):
        import torch

        from mlx_starflow.reference.loading import load_flow

        self.flow = load_flow(golden_case(name) / "model.pth", device, "float32", config=DATA / name / "config.yaml")
        arrays = mx.load(str(DATA / name / "golden.safetensors"))
        channels_first = {key for key, value in arrays.items() if value.ndim == 4 and "output" not in key}
        self.arrays = {
            key: torch.from_numpy(np.array(value.transpose(0, 2, 3, 1) if key in channels_first else value)).to(device)
            for key, value in arrays.items()
        }
        if "y" in self.arrays and name.startswith(("tarflow", "itarflow")):
            self.arrays["y"] = self.arrays["y"].long()

    def __getitem__(self, name: str):
        return self.arrays[name]


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_starflow(name, device):
    from mlx_starflow.reference.sampling import denoise, sample

    case = Case(name, device)
    assert relative(case.flow(case["x"], case["y"]).z, case["z"]) < 1e-5
    if "denoised" in case.arrays:
        assert relative(denoise(case.flow, case["x"], case["y"]), case["denoised"]) < 1e-3
    kinds = sorted(kind for kind in case.arrays if kind.startswith(("reverse", "jacobi")))
    assert kinds
    for kind in kinds:
        settings = dict(STARFLOW[kind])
        if name == "pretrained_lm":
            settings["guidance"] = 2.0
        noise = case["z" if kind == "reverse_of_z" else "noise"]
        x = sample(case.flow, noise, case["y"], case.arrays.get("y_null"), **settings)
        assert difference(x, case[kind]) < 2e-4, kind


@pytest.mark.parametrize("name", TARFLOW_CASES)
def test_tarflow(name, device):
    from mlx_starflow.reference.sampling import sample

    case = Case(name, device)
    labels = case.arrays.get("y")
    out = case.flow(case["x"], labels)
    assert relative(out.z, case["z"]) < 1e-5
    assert relative(out.loss(), case["loss"].reshape(())) < 1e-5
    kinds = {kind for kind in case.arrays if kind.startswith("reverse")}
    assert kinds == (set(TARFLOW) if name == "tarflow" else {"reverse"})
    for kind in kinds:
        for method in ("sequential", JacobiSettings(block_size=5, threshold=1e-12)):
            x = sample(case.flow, case["noise"], labels, method=method, **TARFLOW[kind])
            assert difference(x, case[kind]) < 2e-4
    if name == "tarflow":
        # The release dropped the second and the fourth label.
        dropped = labels.clone()
        dropped[[1, 3]] = -1
        assert relative(case.flow(case["x"], dropped).z, case["z_dropped"]) < 1e-5


@pytest.mark.parametrize("name", ["itarflow", "itarflow_patches", "itarflow_shared"])
def test_itarflow(name, device):
    from mlx_starflow.reference.sampling import denoise, iterate, sample

    case = Case(name, device)
    labels, flow = case.arrays.get("y"), case.flow
    assert relative(flow(case["x"], labels, noise_level=case["t"]).z, case["z"]) < 1e-5
    for kind in sorted(kind for kind in case.arrays if kind.startswith("reverse")):
        x = sample(flow, case["noise"], labels, noise_level=0.3, **ITARFLOW[kind])
        first = slice(0, 1 if kind.endswith("_starflow") else None)  # see ITARFLOW
        assert difference(x[first], case[kind][first]) < 2e-4, kind
    assert relative(denoise(flow.at(0.3), case["x"], labels), case["denoised_t0.3"]) < 1e-4
    levels = np.linspace(0.3, 0.01, 5).tolist()
    for clip, kind in ((False, "iterated_0.3_to_0.01_in_5"), (True, "iterated_0.3_to_0.01_in_5_clipped")):
        assert relative(iterate(flow, 0.3 * case["x"], labels, levels, clip), case[kind]) < 1e-4
