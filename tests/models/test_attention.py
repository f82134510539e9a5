"""What reaches `mx.fast.scaled_dot_product_attention` in inference: what Metal's fused kernels take, and no mask array.

For up to 8 queries these kernels want as many keys or more, and at most 32 queries in the heads that share a key; for
more of them the mask "causal", which skips what it masks. Head dimension 64 is among those of both. Without a Mac this
is as far as a test can go: MLX chooses between its kernels by just these properties.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.kernels import attention as kernel
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.sampling import JacobiSettings, RollingSettings, sample

BATCH, TEXT, LENGTH = 2, 5, 24


@dataclass
class Call:
    queries: int
    keys: int
    mask: str | None


@dataclass
class Calls:
    """What attention was called with; each call is checked as it is made."""

    dtype: mx.Dtype = mx.float32
    made: list[Call] = field(default_factory=list)

    def record(self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: str | None) -> mx.array:
        assert mask in (None, "causal") and isinstance(scale, float)
        assert q.dtype == k.dtype == v.dtype == self.dtype
        assert q.shape[-1] == 64
        assert k.shape == v.shape == (q.shape[0], k.shape[1], k.shape[2], 64)
        queries, keys = q.shape[2], k.shape[2]
        assert queries <= keys
        assert (mask == "causal") == (queries > 1)
        assert queries > 8 or queries * (q.shape[1] // k.shape[1]) <= 32
        self.made.append(Call(queries, keys, mask))
        return attention(q, k, v, scale=scale, mask=mask)


attention = mx.fast.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, in_mlx: None) -> Calls:
    calls = Calls()
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", calls.record)
    monkeypatch.setattr(kernel, "on_cpu", lambda: False)
    return calls


def starflow(**options) -> STARFlow:
    config = {
        "img_size": 6, "channel_size": 2, "patch_size": 1, "channels": 128, "layers_per_block": [1, 2],
        "txt_size": TEXT, "txt_dim": 8, "use_softplus": True, "soft_clip": 4.0, "use_final_norm": True,
    }  # fmt: skip
    return STARFlow(FlowConfig.from_dict({**config, **options}))


MODERN = {"use_qk_norm": True, "norm_type": "rms_norm", "use_swiglu": True, "num_heads": 4, "num_kv_heads": 1}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("options", [{}, MODERN])
def test_forward(calls, options, dtype):
    flow = starflow(**options)
    flow.set_dtype(dtype)
    calls.dtype = dtype
    out = flow(mx.zeros((BATCH, 4, 6, 2)), mx.zeros((BATCH, TEXT, 8)))
    mx.eval(out.z)
    assert [(call.queries, call.keys) for call in calls.made] == [(LENGTH, LENGTH)] + [(LENGTH + TEXT,) * 2] * 2
    assert {call.mask for call in calls.made} == {"causal"}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_one_token_after_another(calls, options, guidance, dtype):
    flow = starflow(**options)
    flow.set_dtype(dtype)
    calls.dtype = dtype
    text = mx.zeros((BATCH, TEXT, 8))
    sample(flow, mx.zeros((BATCH, 4, 6, 2)), text, text[:1], guidance, attn_temp=1.5)
    # The deep block's text, then its two layers token by token, then the shallow block's one.
    prefill, steps = calls.made[:2], calls.made[2:]
    assert [(call.queries, call.keys) for call in prefill] == [(TEXT, TEXT)] * 2
    deep = [(1, TEXT + n) for n in range(1, LENGTH + 1) for _ in range(2)]
    assert [(call.queries, call.keys) for call in steps] == deep + [(1, n) for n in range(1, LENGTH + 1)]
    assert {call.mask for call in steps} == {None}


@pytest.mark.parametrize("size", [1, 4, 8, 10, 100])
def test_many_tokens_at_once(calls, size):
    flow = starflow()
    text = mx.zeros((BATCH, TEXT, 8))
    z = mx.array(np.random.default_rng(0).standard_normal((BATCH, 4, 6, 2)).astype(np.float32))
    for method in (JacobiSettings(block_size=size), RollingSettings(window=size)):
        calls.made.clear()
        sample(flow, z, text, method=method)
        assert max(call.queries for call in calls.made[2:]) == min(size, LENGTH)
        assert max(call.keys for call in calls.made) == TEXT + LENGTH


def test_tarflow(calls):
    config = {"img_size": 8, "channel_size": 1, "patch_size": 2, "channels": 128, "blocks": 2, "layers_per_block": 1}
    flow = TarFlow(TarFlowConfig.from_dict({**config, "num_classes": 3}))
    labels = mx.array([0, 2])
    z = flow(mx.zeros((2, 8, 8, 1)), labels).z
    assert [(call.queries, call.keys, call.mask) for call in calls.made] == [(16, 16, "causal")] * 2
    calls.made.clear()
    sample(flow, z, labels, guidance=1.0, attn_temp=2.0)
    assert {(call.queries, call.mask) for call in calls.made} == {(1, None)}
