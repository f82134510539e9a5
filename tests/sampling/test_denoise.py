"""The score step: against the official code (tests/data), and against the likelihood's slope."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import DATA
from helpers.tiny_flows import tiny_case
from mlx.utils import tree_map

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.sampling import denoise

ARRAYS = [
    (path.parent.name, name)
    for path in sorted(DATA.glob("*/golden.safetensors"))
    if path.parent.name.startswith(("t2i", "pretrained_lm", "tarflow"))
    for name in sorted(mx.load(str(path)))
    if "denoised" in name
]


def test_every_array_is_here():
    assert len(ARRAYS) == 10


@pytest.mark.parametrize(("case", "name"), ARRAYS)
def test_score_step_is_the_official_one(golden, case, name):
    golden = golden(case)
    prefix = name[: name.index("denoised")]
    cleaned = denoise(golden.flow, golden[prefix + "x"], golden.get(prefix + "y"))
    assert golden.relative_error(cleaned, name) < 1e-3
    # The step itself, too: it is smaller than the data.
    step = golden.arrays[name] - golden.arrays[prefix + "x"]
    assert np.abs(np.array(cleaned) - golden.arrays[name]).max() < 1e-3 * np.abs(step).max()


# The worst is off by 0.053: the score of a random network is rough.
@pytest.mark.parametrize("case", ["t2i", "t2i_modern", "tarflow"])
def test_bfloat16_weights(golden, case):
    golden = golden(case, mx.bfloat16)
    name = next(name for name in golden.arrays if name.startswith("denoised"))
    assert golden.relative_error(denoise(golden.flow, golden["x"], golden["y"]), name) < 0.1


def test_step_follows_the_log_likelihood(tiny):
    """The step along a direction is noise_std^2 times the slope of log p."""
    flow, text = tiny.flow, tiny.text
    flow.pop("learnable_self_denoiser", None)
    std = 0.25
    step = denoise(flow, tiny.x, text, noise_std=std) - tiny.x
    for index in range(2):
        condition = None if text is None else text[index : index + 1]
        direction = step[index : index + 1]
        length = float(mx.linalg.norm(direction.reshape(-1)))
        shift = direction * (1e-2 / length)

        def log_likelihood(x, condition=condition):
            return float(-flow(x, condition).nll()[0]) * x.size

        x = tiny.x[index : index + 1]
        slope = (log_likelihood(x + shift) - log_likelihood(x - shift)) / 2e-2
        assert length == pytest.approx(std**2 * slope, rel=0.01)


def test_noise_level_is_the_flows_own_by_default():
    tiny = tiny_case("softplus")
    own = denoise(tiny.flow, tiny.x, tiny.text)
    given = denoise(tiny.flow, tiny.x, tiny.text, noise_std=tiny.flow.config.noise_std)
    assert np.array_equal(np.array(own), np.array(given))
    assert np.array_equal(np.array(denoise(tiny.flow, tiny.x, tiny.text, noise_std=0.0)), np.array(tiny.x))


def test_no_nan_is_returned():
    for family in ("softplus", "tarflow"):
        tiny = tiny_case(family)
        tiny.flow.update(tree_map(lambda w: w * float("nan"), tiny.flow.parameters()))
        with pytest.raises(StarflowError, match="not finite"):
            denoise(tiny.flow, tiny.x, tiny.text)


def test_the_score_step_takes_little_more_memory_than_a_forward_pass():
    others = mx.get_active_memory()  # arrays that other tests keep
    config = {"img_size": 16, "channel_size": 4, "patch_size": 1, "channels": 128, "layers_per_block": [2, 12]}
    flow = STARFlow(FlowConfig(**config))
    mx.eval(flow.parameters())
    x = mx.random.normal((1, 16, 16, 4))

    def peak(run) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(run())
        return mx.get_peak_memory() - others

    peak(lambda: flow(x).z)  # rope frequencies and kernels are made once
    forward = peak(lambda: flow(x).z)
    assert peak(lambda: denoise(flow, x)) < 1.5 * forward
    assert peak(lambda: mx.grad(lambda x: flow(x).nll().sum())(x)) > 1.5 * forward
