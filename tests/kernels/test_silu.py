"""SiLU by sums and products is SiLU."""

import mlx.core as mx
import numpy as np

from mlx_starflow.kernels import silu as module
from mlx_starflow.kernels.silu import silu


def test_silu(monkeypatch):
    x = np.concatenate([np.linspace(-40, 40, 200_001), [0.0, -1e30, 1e30, -1e-30]]).astype(np.float32)
    expected = x.astype(np.float64) / (1 + np.exp(-np.maximum(x.astype(np.float64), -700)))
    for on_cpu in (True, False):
        monkeypatch.setattr(module, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        found = np.array(silu(mx.array(x)))
        assert np.all(np.abs(found - expected) <= 3e-7 * np.abs(x))
    assert np.isnan(np.array(silu(mx.array([np.nan], mx.float32)))).all()
