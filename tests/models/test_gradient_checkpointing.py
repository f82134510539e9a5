"""Layers that a gradient computes again: the same gradients in less memory."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_starflow.models.gradient_checkpointing import checkpointed, weights_first


def layers(count: int) -> list[nn.Module]:
    mx.random.seed(0)
    made = [nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(count)]
    mx.eval([layer.parameters() for layer in made])
    return made


def gradients(model: nn.Module, x: mx.array, run) -> tuple[dict[str, mx.array], mx.array]:
    def loss(weights, x):
        model.update(weights)
        for layer in model.layers:
            x = x + run(layer)(x)
        return mx.square(x).mean()

    of_weights, of_x = mx.grad(loss, argnums=(0, 1))(model.trainable_parameters(), x)
    return dict(tree_flatten(of_weights)), of_x


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("frozen", [[], [1], [0, 1, 2]])
def test_the_gradients_are_the_same(ordered, frozen):
    model = nn.Sequential(*layers(3))
    for index in frozen:
        model.layers[index].freeze()
    x = mx.random.normal((4, 32), key=mx.random.key(1))
    expected, expected_x = gradients(model, x, lambda layer: layer)
    if ordered:
        with weights_first():
            found, found_x = gradients(model, x, checkpointed)
    else:
        found, found_x = gradients(model, x, checkpointed)
    assert found.keys() == expected.keys() and len(found) == 4 * (3 - len(frozen))
    for name, gradient in expected.items():
        assert mx.allclose(found[name], gradient, rtol=1e-5, atol=1e-7), name
    assert mx.allclose(found_x, expected_x, rtol=1e-5, atol=1e-7)


def test_constants_and_what_the_layer_holds_afterwards():
    (layer,) = layers(1)
    held = dict(tree_flatten(layer.parameters()))
    x = mx.ones((2, 32))
    run = checkpointed(layer, lambda h, scale, nothing: scale * layer(h))
    found = mx.grad(lambda x: run(x, 3.0, None).sum())(x)
    assert mx.allclose(found, mx.grad(lambda x: 3 * layer(x).sum())(x), rtol=1e-5)
    assert all(weight is held[name] for name, weight in tree_flatten(layer.parameters()))


def test_only_inputs_are_kept():
    x = mx.random.normal((512, 32))
    peaks = {}
    for count in (4, 12):
        model = nn.Sequential(*layers(count))
        mx.eval(x)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with weights_first():
            mx.eval(gradients(model, x, checkpointed))
        peaks[count] = mx.get_peak_memory() - before
    weights = sum(weight.nbytes for _, weight in tree_flatten(model.parameters())) / 12
    assert peaks[12] - peaks[4] < 8 * (1.5 * x.nbytes + weights)
