"""The MLX flow against its PyTorch twin, on configs drawn from the whole space that both know."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.sampling import JacobiSettings, denoise, sample

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

CONFIGS = st.fixed_dictionaries(
    {
        "patch_size": st.sampled_from([1, 2]),
        "layers_per_block": st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(lambda n: n[-1] > 0),
        "head_dim": st.sampled_from([32, 64]),
        "num_kv_heads": st.sampled_from([None, 1]),
        "txt_size": st.sampled_from([0, 5]),
        "sos": st.booleans(),
        "seq_order": st.sampled_from(["L2R", "R2L"]),
        "pt_seq_len": st.sampled_from([None, 7]),
        "use_softplus": st.booleans(),
        "cond_top_only": st.booleans(),
        "use_final_norm": st.booleans(),
        "soft_clip": st.sampled_from([0.0, 4.0]),
        "use_bias": st.booleans(),
        "use_swiglu": st.booleans(),
        "use_qk_norm": st.booleans(),
        "use_post_norm": st.booleans(),
        "norm_type": st.sampled_from(["layer_norm", "rms_norm"]),
        "top_block_channels": st.sampled_from([None, 128]),
        "latent_norm_regularization": st.sampled_from([0.0, 1e-4]),
    }
)


def twins(values: dict, seed: int) -> tuple:
    """The same random flow twice, far enough from the identity to tell."""
    from mlx_starflow.reference.starflow import STARFlow as Twin

    config = FlowConfig(img_size=4, channel_size=3, channels=64, txt_dim=10, **values)
    torch.manual_seed(seed)
    twin = Twin(config)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            scale = 0.25 if name.endswith(("norm.weight", "sos_embed")) else 0.5 * parameter.shape[-1] ** -0.5
            # Mild affine maps: an exponential scale without a clip overflows after a few tokens otherwise.
            scale = 0.2 * scale if "proj_out" in name else scale
            parameter.add_(scale * torch.randn_like(parameter))
    flow = STARFlow(config)
    flow.load_weights([(name, mx.array(value.numpy())) for name, value in twin.state_dict().items()])
    return flow, twin


def inputs(config: FlowConfig, shape: tuple, seed: int) -> tuple:
    rng = np.random.default_rng(seed)
    p = config.patch_size
    x = rng.standard_normal((2, p * shape[0], p * shape[1], 3)).astype(np.float32)
    texts = rng.standard_normal((2, 2, 5, 10)).astype(np.float32) if config.txt_size else (None, None)
    return x, *texts


def both(array):
    return (None, None) if array is None else (mx.array(array), torch.from_numpy(array))


def relative(ours, theirs) -> float:
    ours, theirs = np.array(ours), theirs.detach().numpy()
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6))


def check(values: dict, shape: tuple, seed: int) -> None:
    flow, twin = twins(values, seed)
    x, text, null = inputs(flow.config, shape, seed)
    (x, x_twin), (text, text_twin), (null, null_twin) = both(x), both(text), both(null)

    def loss(parameters, x):
        flow.update(parameters)
        return flow(x, text).loss()

    out, theirs = flow(x, text), twin(x_twin.requires_grad_(), text_twin)
    assert relative(out.z, theirs.z) < 1e-5
    assert relative(out.log_det, theirs.log_det) < 2e-5
    penalty = flow.config.latent_norm_regularization
    total = theirs.nll().mean() + penalty * sum(h.square().mean() for h in theirs.hidden[:-1])
    assert relative(out.loss(), total) < 1e-5

    total.backward()
    _, (gradients, x_gradient) = mx.value_and_grad(loss, argnums=(0, 1))(flow.trainable_parameters(), x)
    assert relative(x_gradient, x_twin.grad) < 1e-4
    named = dict(tree_flatten(gradients))
    for name, parameter in twin.named_parameters():
        # A layer that no output depends on, such as text keys that nothing attends to, has no gradient in PyTorch.
        theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert np.abs(np.array(named[name]) - theirs.numpy()).max() < 1e-4 * max(float(theirs.abs().max()), 1e-3), name

    from mlx_starflow.reference import sampling as reference

    weight = 1.5 if text is not None else 0.0
    z = 0.7 * x
    z_twin = torch.from_numpy(np.array(z))
    ours = sample(flow, z, text, null, weight)
    twins_sample = reference.sample(twin, z_twin, text_twin, null_twin, weight)
    assert relative(ours, twins_sample) < 2e-4
    settings = JacobiSettings(block_size=3, threshold=1e-12)
    jacobi = sample(flow, z, text, null, weight, "jacobi", jacobi_settings=settings)
    assert relative(jacobi, twins_sample) < 2e-4
    assert relative(denoise(flow, x, text), reference.denoise(twin, x_twin, text_twin)) < 1e-4


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=CONFIGS, shape=st.sampled_from([(4, 4), (2, 6), (5, 3)]), seed=st.integers(0, 2**16))
def test_mlx_equals_its_twin(values, shape, seed):
    check(values, shape, seed)


def test_bfloat16_stays_close():
    flow, twin = twins({"patch_size": 1, "layers_per_block": [2, 2], "txt_size": 5, "use_softplus": True}, 0)
    x, text, _ = inputs(flow.config, (4, 4), 0)
    exact = twin(torch.from_numpy(x), torch.from_numpy(text)).z
    flow.update(tree_unflatten([(k, v.astype(mx.bfloat16)) for k, v in tree_flatten(flow.parameters())]))
    assert relative(flow(mx.array(x), mx.array(text)).z, exact) < 0.03
    twin.to(torch.bfloat16)
    assert relative(mx.array(twin(torch.from_numpy(x), torch.from_numpy(text)).z.detach().numpy()), exact) < 0.03
