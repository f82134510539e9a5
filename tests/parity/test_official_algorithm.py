"""The opponent of speed measurements computes what the PyTorch reference and the official code compute."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.examples import example_module
from helpers.tiny_flows import tiny_case
from helpers.torch_reference import DEVICES, both, difference, give_weights

from mlx_starflow.sampling import SamplingTrace

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]

STARFLOWS = ["softplus", "exp_all_text", "shifted", "patches", "no_text", "identity_block", "modern", "language_model"]


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
@pytest.mark.parametrize("family", STARFLOWS)
def test_the_same_sample(family, method, device):
    official_algorithm = example_module("reports/official_algorithm.py")
    from mlx_starflow.reference.sampling import sample
    from mlx_starflow.reference.starflow import STARFlow

    tiny = tiny_case(family)
    torch_model = give_weights(STARFlow(tiny.flow.config), tiny.flow, device)
    z = both(np.random.default_rng(0).standard_normal(tiny.x.shape).astype(np.float32), device)[1]
    text, null = (both(None if a is None else np.array(a), device)[1] for a in (tiny.text, tiny.null_text))
    for guidance in (0.0, 1.5) if text is not None else (0.0,):
        trace = SamplingTrace()
        expected = sample(torch_model, z, text, null, guidance, method, trace=trace)
        x, evaluations = official_algorithm.sample(torch_model, z, text, null, guidance, method)
        assert difference(x, expected) < 2e-4
        assert evaluations == trace.evaluations


def test_the_released_configuration(golden, device):
    """Against arrays of the official code, at a sequence longer than a Jacobi block."""
    official_algorithm = example_module("reports/official_algorithm.py")

    from mlx_starflow.reference.starflow import STARFlow

    case = golden("t2i")
    torch_model = give_weights(STARFlow(case.flow.config), case.flow, device)
    noise, text, null = (both(case.arrays[name], device)[1] for name in ("noise", "y", "y_null"))
    length = noise.shape[1] * noise.shape[2]
    assert length > 16
    x, evaluations = official_algorithm.sample(torch_model, noise, text, null, 2.5, "sequential")
    assert difference(case["reverse_cfg"], x) < 2e-4
    assert evaluations == [length] * len(case.flow.blocks)
    x, evaluations = official_algorithm.sample(torch_model, noise, text, null, 2.5, "jacobi")
    assert difference(case["jacobi_cfg_th1e-3"], x) < 2e-4
    assert max(evaluations) < length
