"""STARFlow's forward pass: against the official code (tests/data), and what makes it a flow."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import DATA
from helpers.tiny_flows import tiny_case
from mlx.utils import tree_flatten, tree_unflatten

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.flow import frame_count
from mlx_starflow.models.starflow import FlowConfig, STARFlow, patchify, sanitize, unpatchify

CASES = [
    (path.parent.name, name.removesuffix("x"))
    for path in sorted(DATA.glob("*/golden.safetensors"))
    if path.parent.name.startswith(("t2i", "t2v", "pretrained_lm"))
    for name in sorted(mx.load(str(path)))
    if name.endswith("x")
]


def test_every_case_is_here():
    assert {case for case, _ in CASES} == {
        "t2i", "t2i_patch2", "t2i_all_text", "t2i_shifted", "t2i_identity_block", "t2i_modern", "pretrained_lm", "t2v",
    }  # fmt: skip
    assert ("t2i", "4x16.") in CASES and ("t2i_patch2", "8x32.") in CASES


@pytest.mark.parametrize(("case", "prefix"), CASES)
def test_forward_is_the_official_one(golden, case, prefix):
    golden = golden(case)
    flow = golden.flow
    x = golden[prefix + "x"]
    out = flow(x, golden[prefix + "y"])
    assert golden.relative_error(out.z, prefix + "z") < 1e-5
    assert abs(float(out.loss()) - float(golden.arrays[prefix + "loss"])) < 1e-5 * abs(golden.arrays[prefix + "loss"])
    assert len(out.hidden) == len(flow.blocks) + 1
    assert len(out.block_log_dets) == len(flow.blocks)

    side = flow.config.patch_size
    for index, hidden in enumerate(out.hidden):
        expected = golden.arrays[f"{prefix}output.{index}"]
        tokens = flow.tokens(hidden).reshape(expected.shape)
        assert golden.relative_error(tokens, f"{prefix}output.{index}") < 1e-5

    for index, (block, log_det) in enumerate(zip(flow.blocks, out.block_log_dets, strict=True)):
        assert log_det.shape == x.shape
        tokens = patchify(log_det, side)
        if block.is_identity:
            assert not golden.arrays[f"{prefix}logdet.{index}"].any() and not np.array(tokens).any()
            continue
        expected = golden.arrays[f"{prefix}logdet.{index}"]
        own = block.permute(tokens, frame_count(x.shape)).reshape(expected.shape)
        assert golden.relative_error(own, f"{prefix}logdet.{index}") < 1e-5
    assert np.array_equal(np.array(out.log_det), np.array(sum(out.block_log_dets)))


# The worst of these cases is off by 0.015 (z), 0.016 (a block's output) and 0.011 (loss).
@pytest.mark.parametrize(("case", "prefix"), CASES)
def test_bfloat16_weights(golden, case, prefix):
    golden = golden(case, mx.bfloat16)
    out = golden.flow(golden[prefix + "x"], golden[prefix + "y"])
    assert out.z.dtype == out.log_det.dtype == mx.float32
    assert golden.relative_error(out.z, prefix + "z") < 0.03
    for index, hidden in enumerate(out.hidden):
        tokens = golden.flow.tokens(hidden).reshape(golden.arrays[f"{prefix}output.{index}"].shape)
        assert golden.relative_error(tokens, f"{prefix}output.{index}") < 0.03
    assert abs(float(out.loss()) - float(golden.arrays[prefix + "loss"])) < 0.02


def test_new_flow_is_the_identity():
    for family in ("softplus", "exp_all_text", "shifted", "modern"):
        tiny = tiny_case(family)
        out = STARFlow(tiny.flow.config)(tiny.x, tiny.text)
        assert np.abs(np.array(out.z - tiny.x)).max() < 1e-6
        assert np.abs(np.array(out.log_det)).max() < 1e-6


def test_log_det_is_that_of_the_jacobian(tiny):
    text = None if tiny.text is None else tiny.text[:1]
    x = tiny.x[:1]
    out = tiny.flow(x, text)
    rows = [
        mx.vjp(lambda v: tiny.flow(v, text).z.reshape(-1), [x], [cotangent])[1][0].reshape(-1)
        for cotangent in mx.eye(x.size)
    ]
    sign, expected = np.linalg.slogdet(np.array(mx.stack(rows)).astype(np.float64))
    assert sign in (1.0, -1.0)
    assert abs(float(out.log_det.sum()) - expected) < 2e-5 * max(1.0, abs(expected))
    # The flow is far from the identity, but where it cannot change volumes.
    assert (np.abs(np.array(out.log_det)).max() > 0.2) == getattr(tiny.flow.config, "nvp", True)


def test_jacobian_by_finite_differences(tiny):
    """The gradients above against differences of z itself."""
    text = None if tiny.text is None else tiny.text[:1]
    x = tiny.x[:1]
    step = 1e-2
    shifts = mx.eye(x.size).reshape(-1, *x.shape[1:]) * step
    many = None if text is None else mx.repeat(text, x.size, axis=0)
    plus, minus = tiny.flow(x + shifts, many).z, tiny.flow(x - shifts, many).z
    columns = np.array((plus - minus) / (2 * step)).reshape(x.size, x.size)
    rows = [
        mx.vjp(lambda v: tiny.flow(v, text).z.reshape(-1), [x], [cotangent])[1][0].reshape(-1)
        for cotangent in mx.eye(x.size)
    ]
    assert np.abs(columns.T - np.array(mx.stack(rows))).max() < 5e-3 * np.abs(columns).max()


def test_loss_gradients_are_finite_differences(tiny):
    """The change of the loss along each tensor's gradient, and along the input's, is the gradient's length."""
    tiny.flow.pop("learnable_self_denoiser", None)
    parameters = dict(tree_flatten(tiny.flow.trainable_parameters()))
    assert "var" not in parameters

    def loss(values, x):
        tiny.flow.update(tree_unflatten(list(values.items())))
        return tiny.flow(x, tiny.text).loss()

    slopes, slope_x = mx.grad(loss, argnums=(0, 1))(parameters, tiny.x)
    step = 3e-3
    checked = 0
    for name, slope in slopes.items():
        length = float(mx.linalg.norm(slope.reshape(-1)))
        if length < 1e-3:
            continue
        shift = slope * (step / length)
        rise = loss({**parameters, name: parameters[name] + shift}, tiny.x)
        fall = loss({**parameters, name: parameters[name] - shift}, tiny.x)
        assert abs(float(rise - fall) / (2 * step) - length) < 0.02 * length + 1e-4, name
        checked += 1
    assert checked > len(slopes) / 2
    length = float(mx.linalg.norm(slope_x.reshape(-1)))
    shift = slope_x * (step / length)
    rise, fall = loss(parameters, tiny.x + shift), loss(parameters, tiny.x - shift)
    assert abs(float(rise - fall) / (2 * step) - length) < 0.01 * length


def test_latent_norm_penalty():
    tiny = tiny_case("softplus")
    out = tiny.flow(tiny.x, tiny.text)
    tiny.flow.config.latent_norm_regularization = 0.5
    penalized = tiny.flow(tiny.x, tiny.text).loss()
    squares = sum(float(mx.square(h).mean()) for h in out.hidden[:-1])
    assert float(penalized - out.loss()) == pytest.approx(0.5 * squares, rel=1e-5)


def test_nll_is_per_sample(tiny):
    whole = tiny.flow(tiny.x, tiny.text)
    assert whole.nll().shape == (2,)
    assert float(whole.nll().mean()) == pytest.approx(float(whole.loss()), rel=1e-6)
    for index in range(2):
        text = None if tiny.text is None else tiny.text[index : index + 1]
        one = tiny.flow(tiny.x[index : index + 1], text)
        assert float(one.nll()[0]) == pytest.approx(float(whole.nll()[index]), rel=1e-5, abs=1e-6)


def test_blocks_are_causal_in_their_own_order(tiny):
    flow = tiny.flow
    tokens = flow.tokens(tiny.x)
    text_length = 0 if tiny.text is None or tiny.text.ndim == 1 else tiny.text.shape[1]
    rope_frequencies = None if tiny.text is not None and tiny.text.ndim == 1 else _rope_frequencies(tiny, text_length)
    for block, condition in zip(flow.blocks, flow.block_conditions(tiny.text, 2), strict=True):
        if block.is_identity:
            continue

        def run(own: np.ndarray, block=block, condition=condition) -> list[np.ndarray]:
            """z and log-det of tokens in the block's order, in that order."""
            parts = block(block.unpermute(mx.array(own)), condition, rope_frequencies)
            return [np.array(block.permute(part)) for part in parts]

        own = np.array(block.permute(tokens))
        z, log_det = run(own)
        for n in (0, 2, own.shape[1] - 1):
            changed = own.copy()
            changed[:, n] += 1.0
            other_z, other_log_det = run(changed)
            assert np.array_equal(other_z[:, :n], z[:, :n])
            # A token's own mean and scale do not depend on it either.
            assert np.array_equal(other_log_det[:, : n + 1], log_det[:, : n + 1])
            assert (np.abs(other_z[:, n:] - z[:, n:]).max(axis=(0, 2)) > 0).all()


def _rope_frequencies(tiny, text_length):
    return tiny.flow.rope_frequencies(tiny.x.shape, text_length) if isinstance(tiny.flow, STARFlow) else None


def test_only_the_deep_block_reads_text_unless_told():
    for family, readers in (("softplus", 1), ("exp_all_text", 3), ("no_text", 0)):
        tiny = tiny_case(family)
        assert [block.txt_dim > 0 for block in tiny.flow.config.blocks] == [False] * (3 - readers) + [True] * readers
        if readers:
            out = tiny.flow(tiny.x, tiny.text)
            other = tiny.flow(tiny.x, tiny.text + 1)
            same = [np.array_equal(np.array(a), np.array(b)) for a, b in zip(out.hidden, other.hidden, strict=True)]
            assert same == [True] * (4 - readers) + [False] * readers


@pytest.mark.parametrize("shape", [(1, 7), (5, 1), (3, 2), (6, 6)])
def test_any_aspect_ratio(shape):
    for family in ("softplus", "patches", "no_text"):
        tiny = tiny_case(family)
        patch, channels = tiny.flow.config.patch_size, tiny.flow.config.channel_size
        x = mx.random.normal((2, shape[0] * patch, shape[1] * patch, channels), key=mx.random.key(0))
        out = tiny.flow(x, tiny.text)
        assert out.z.shape == out.log_det.shape == x.shape
        assert mx.isfinite(out.z).all().item()


def test_patches_are_a_permutation():
    x = mx.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 1].tolist() == mx.concatenate([x[0, 0, 2], x[0, 0, 3], x[0, 1, 2], x[0, 1, 3]]).tolist()
    assert np.array_equal(np.array(unpatchify(tokens, 2, x.shape)), np.array(x))


def test_keep_hides_inputs_of_the_deep_block():
    tiny = tiny_case("softplus")
    x, text = tiny.x, tiny.text
    plain = tiny.flow(x, text)
    count = x.shape[1] * x.shape[2]
    kept = tiny.flow(x, text, context_mask=mx.ones((2, count)))
    assert np.array_equal(np.array(kept.z), np.array(plain.z))

    # Input n is the token before token n; sample 1 stays whole.
    context_mask = np.ones((2, count), np.float32)
    context_mask[0, 3] = 0
    hidden = tiny.flow(x, text, context_mask=mx.array(context_mask))
    assert tiny.flow.config.blocks[-1].flip
    change = np.abs(np.array(hidden.block_log_dets[-1] - plain.block_log_dets[-1])).reshape(2, count, -1).max(-1)
    change = change[:, ::-1]
    assert not change[1].any() and not change[0, :3].any() and (change[0, 3:] > 0).all()
    for before, after in zip(plain.block_log_dets[:-1], hidden.block_log_dets[:-1], strict=True):
        assert np.array_equal(np.array(before), np.array(after))

    # With no input left, the deep block's scale depends on text and position alone.
    blind = [tiny.flow(v, text, context_mask=mx.zeros((2, count))).block_log_dets[-1] for v in (x, x + 1)]
    assert np.array_equal(np.array(blind[0]), np.array(blind[1]))


def test_wrong_inputs_are_named():
    tiny = tiny_case("softplus")
    flow, x, text = tiny.flow, tiny.x, tiny.text
    with pytest.raises(StarflowError, match=r"shape \(2, 2, 3, 3\).*\[batch, height, width, 2\]"):
        flow(mx.zeros((2, 2, 3, 3)), text)
    with pytest.raises(StarflowError, match="shape"):
        flow(x[0], text)
    with pytest.raises(StarflowError, match="reads text"):
        flow(x)
    with pytest.raises(StarflowError, match="7 wide; this flow reads 6"):
        flow(x, mx.zeros((2, 3, 7)))
    with pytest.raises(StarflowError, match="1 texts for 2 samples"):
        flow(x, text[:1])
    with pytest.raises(StarflowError, match=r"embeddings \[batch, length, width\]"):
        flow(x, mx.array([0, 1]))
    patches = tiny_case("patches")
    with pytest.raises(StarflowError, match="multiples of 2"):
        patches.flow(patches.x[:, :3], patches.text)


def test_weights_must_fit():
    flow = STARFlow(FlowConfig(4, 2, 1, 32, [1, 1], head_dim=32))
    weights = tree_flatten(flow.parameters())
    flow.load_weights(weights, strict=True)
    with pytest.raises(ValueError, match="Missing"):
        flow.load_weights(weights[1:], strict=True)


def test_sanitize_drops_dead_buffers_and_nothing_else():
    kept = {"blocks.0.proj_in.weight": 1, "blocks.0.attn_blocks.0.attention.qkv.weight": 2, "blocks.0.variance": 3}
    dead = {"var": 0, "blocks.0.attn_mask": 0, "feat_rope.freqs_cos": 0, "feat_rope.freqs_sin": 0}
    assert sanitize({**kept, **dead}) == kept


GOOD = {"img_size": 8, "channel_size": 4, "patch_size": 1, "channels": 128, "layers_per_block": "1 1 2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary": 1}, "unknown key rotary"),
        ({"channels": None}, "missing key channels"),
        ({"seq_order": "T2B"}, "seq_order must be L2R or R2L, not 'T2B'"),
        ({"norm_type": "batch_norm"}, "norm_type must be"),
        ({"txt_size": 6}, "txt_dim, the width of the text encoder, is missing"),
        ({"layers_per_block": "1 two"}, "two"),
        ({"patch_size": 0}, "patch_size must be a positive integer, not 0"),
        ({"top_block": {"depth": 3}}, "top_block.*depth"),
    ],
)
def test_config_mistakes_are_named(change, message):
    assert FlowConfig.from_dict(GOOD).layers_per_block == [1, 1, 2]
    values = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(StarflowError, match=message):
        FlowConfig.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaln": 1}, "adaln must be 0"),
        ({"rope": 0}, "rope must be 1"),
        ({"nvp": 0}, "nvp must be 1"),
        ({"vae": "someone/else"}, "unknown vae 'someone/else'"),
        ({"img_size": None}, "missing key img_size"),
        ({"img_size": None, "vae": "stabilityai/sd-vae-ft-ema"}, "missing key img_size"),
        ({"img_size": "big", "vae": "stabilityai/sd-vae-ft-ema"}, "img_size must be a number, not 'big'"),
        ({"noise_std": "some"}, "noise_std must be a number, not 'some'"),
        ({"sos": "maybe"}, "sos must be a number, not 'maybe'"),
    ],
)
def test_official_config_mistakes_are_named(change, message):
    arguments = [{key: value} for key, value in {**GOOD, **change}.items()]
    with pytest.raises(StarflowError, match=message):
        FlowConfig.from_official({"arguments": arguments})


def test_config_round_trip():
    for family in ("softplus", "shifted", "modern", "language_model"):
        config = tiny_case(family).flow.config
        again = FlowConfig.from_dict({"model_type": "starflow", "pipeline": {}, **config.to_dict()})
        assert again == config and again.blocks == config.blocks


SHARED = {
    "txt_size": 128, "patch_size": 1, "channels": 3072, "blocks": 6, "layers_per_block": "2 2 2 2 2 24", "nvp": 1,
    "rope": 1, "adaln": 0, "sos": 1, "seq_order": "L2R", "use_softplus": 1, "cond_top_only": 1, "use_final_norm": 1,
    "text": "google/flan-t5-xl", "cfg": 2.5, "drop_label": 0.1, "soft_clip": 4, "lr": 6.4e-05, "min_lr": "1e-6",
}  # fmt: skip
IMAGE = {
    **SHARED, "img_size": 256, "channel_size": 4, "noise_std": 0.3, "vae": "stabilityai/sd-vae-ft-ema",
    "latent_norm_regularization": "1e-4", "batch_size": 1024,
}  # fmt: skip
VIDEO = {
    **SHARED, "img_size": 640, "txt_size": 256, "vid_size": "81:16", "fps_cond": 1, "channel_size": 48,
    "top_block_channels": 4096, "noise_std": 0.5, "pt_seq_len": 32, "mix_aspect": 1, "learnable_self_denoiser": 1,
    "conditional_denoiser": 1, "denoiser_window": 10, "cond_noise_level": 1, "temporal_causal": 2,
    "shallow_block_local": 1, "vae": "Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6", "finetuned_vae": "none",
}  # fmt: skip


def test_released_image_config():
    with pytest.raises(StarflowError, match="txt_dim"):
        FlowConfig.from_official({"arguments": [{key: value} for key, value in IMAGE.items()]})
    config = FlowConfig.from_official(
        {"arguments": [{key: value} for key, value in (IMAGE | {"txt_dim": 2048}).items()]}
    )
    assert (config.img_size, config.pt_seq_len, config.channel_size) == (32, 32, 4)
    assert config.latent_norm_regularization == 1e-4 and config.noise_std == 0.3 and config.use_softplus is True
    assert [block.num_layers for block in config.blocks] == [2, 2, 2, 2, 2, 24]
    assert [block.flip for block in config.blocks] == [True, False, True, False, True, False]
    assert [block.txt_dim for block in config.blocks] == [0, 0, 0, 0, 0, 2048]
    deep = config.blocks[-1]
    assert (deep.channels, deep.num_heads, deep.head_dim, deep.in_channels, deep.soft_clip) == (3072, 48, 64, 4, 4.0)
    assert FlowConfig.from_dict(config.to_dict()) == config


def test_released_video_config():
    config = FlowConfig.from_official(VIDEO | {"txt_dim": 2048})
    assert (config.img_size, config.pt_seq_len, config.vid_size) == (40, 32, "81:16")
    assert (config.blocks[0].channels, config.blocks[-1].channels, config.blocks[-1].num_heads) == (3072, 4096, 64)
    assert config.learnable_self_denoiser and config.denoiser_window == 10 and config.temporal_causal == 2
