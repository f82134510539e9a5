"""The learned denoiser: attention by slices is attention under the release's mask, and its gradients."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.denoiser import Denoiser, DenoiserConfig

TEXT, FRAMES, SIZE = 3, 5, 4


def make(look_ahead: int, window: int | None, txt_dim: int = 6) -> Denoiser:
    mx.random.seed(7)
    config = DenoiserConfig(
        channels=16, num_layers=3, head_dim=8, num_heads=2, num_kv_heads=2, in_channels=2, txt_dim=txt_dim,
        use_final_norm=True, look_ahead=look_ahead, window=window,
    )  # fmt: skip
    denoiser = Denoiser(config)
    denoiser.load_weights([(name, 0.3 * mx.random.normal(a.shape)) for name, a in tree_flatten(denoiser.parameters())])
    return denoiser


def inputs(denoiser: Denoiser) -> tuple[mx.array, mx.array | None, mx.array]:
    x = mx.random.normal((2, FRAMES * SIZE, 2), key=mx.random.key(0))
    length = TEXT if denoiser.config.txt_dim else 0
    angles = mx.random.normal((length + FRAMES * SIZE, 4), key=mx.random.key(2))
    text = mx.random.normal((2, TEXT, 6), key=mx.random.key(1)) if length else None
    return x, text, mx.cos(angles) + 1j * mx.sin(angles)


def masked(denoiser: Denoiser, x: mx.array, text: mx.array | None, rope_frequencies: mx.array) -> mx.array:
    """The same network with one mask over everything, by the release's rule."""
    config = denoiser.config
    h, start = denoiser.embed(x), 0
    if text is not None:
        start = text.shape[1]
        h = mx.concatenate([denoiser.embed_text(text), h], axis=1)
    place = np.arange(h.shape[1]) - start
    q, k = place[:, None], place[None]
    window = 10**6 if config.window is None else config.window
    last = np.maximum(q, 0) // SIZE + config.look_ahead
    seen = (k < 0) | ((k // SIZE >= q // SIZE + config.look_ahead - window) & (k // SIZE <= last))
    for layer in denoiser.attn_blocks:
        queries, keys, values = layer.before(h, rope_frequencies)
        scale = config.head_dim**-0.5
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mx.array(seen))
        h = layer.after(h, out.transpose(0, 2, 1, 3).reshape(*h.shape[:2], -1))
    return denoiser.predict(h[:, start:])


@pytest.mark.parametrize("txt_dim", [6, 0])
@pytest.mark.parametrize(("look_ahead", "window"), [(0, 1), (0, 3), (0, None), (1, 1), (1, 2), (1, None), (2, 3)])
def test_slices_are_the_mask(look_ahead, window, txt_dim):
    denoiser = make(look_ahead, window, txt_dim)
    x, text, rope_frequencies = inputs(denoiser)
    expected = masked(denoiser, x, text, rope_frequencies)
    assert (
        mx.abs(denoiser(x, text, rope_frequencies, FRAMES) - expected).max().item()
        < 1e-5 * mx.abs(expected).max().item()
    )


def test_checkpointed_gradients_are_the_same():
    denoiser = make(1, 2)
    x, text, rope_frequencies = inputs(denoiser)

    def loss(parameters, x, checkpoint):
        denoiser.update(parameters)
        return mx.square(denoiser(x, text, rope_frequencies, FRAMES, checkpoint)).mean()

    plain, with_checkpoints = (
        mx.grad(loss, argnums=(0, 1))(denoiser.trainable_parameters(), x, checkpoint) for checkpoint in (False, True)
    )
    for (name, a), (_, b) in zip(tree_flatten(plain), tree_flatten(with_checkpoints), strict=True):
        assert mx.abs(a - b).max().item() < 1e-6 * max(1.0, mx.abs(a).max().item()), name


def test_a_new_denoiser_changes_nothing():
    config = make(1, 2).config
    x, text, rope_frequencies = inputs(make(1, 2))
    assert not Denoiser(config)(x, text, rope_frequencies, FRAMES).any()


def test_mistakes():
    with pytest.raises(StarflowError, match="denoiser_window must be 2 or more"):
        make(2, 1)
    denoiser = make(1, 2)
    x, _, rope_frequencies = inputs(denoiser)
    with pytest.raises(StarflowError, match="this denoiser reads text"):
        denoiser(x, None, rope_frequencies, FRAMES)
