from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.loop.optimizers import GroupedOptimizer
from mlx_starflow.training.loop.schedules import cosine, ema_decay
from mlx_starflow.training.loop.weights import assign, trainable, update_average


def test_cosine():
    assert cosine(0.0, 0.1) == 0
    assert cosine(0.05, 0.1) == pytest.approx(0.5)
    assert cosine(0.1, 0.1) == pytest.approx(1)
    assert cosine(0.55, 0.1) == pytest.approx(0.51)
    assert cosine(1.0, 0.1) == pytest.approx(0.02)
    assert cosine(0.0, 0.0) == 1
    assert cosine(1.0, 0.1, floor=0.5) == pytest.approx(0.5)


def test_average_is_its_formula():
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(3).astype(np.float32) for _ in range(30)]
    average = {"w": mx.array(values[0])}
    expected = values[0].astype(np.float64)
    for step, value in enumerate(values[1:], 1):
        update_average(average, {"w": mx.array(value)}, mx.array(ema_decay(0.7, step)))
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert np.abs(np.array(average["w"]) - expected).max() < 1e-6
    assert [ema_decay(0.7, step) for step in (1, 1000)] == [pytest.approx(2 / 11), 0.7]


def test_adamw_is_its_formula():
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((2, 3)) for name in ("a", "text.b")}
    optimizer = GroupedOptimizer(
        {name: mx.array(w.astype(np.float32)) for name, w in weights.items()},
        betas=(0.9, 0.98),
        weight_decay=0.1,
        is_fast=lambda name: name == "text.b",
        factor=8.0,
    )
    found = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    first = {name: np.zeros((2, 3)) for name in weights}
    second = {name: np.zeros((2, 3)) for name in weights}
    for step in range(1, 6):
        lr = 0.01 * step
        gradients = {name: rng.standard_normal((2, 3)) for name in weights}
        found = optimizer.apply(
            {name: mx.array(g.astype(np.float32)) for name, g in gradients.items()}, found, mx.array(lr)
        )
        for name, g in gradients.items():
            rate, decay = (8 * lr, 0.0) if name == "text.b" else (lr, 0.1)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.98 * second[name] + 0.02 * g**2
            m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.98**step)
            weights[name] = weights[name] - rate * decay * weights[name] - rate * m / (np.sqrt(v) + 1e-8)
            assert np.abs(np.array(found[name]) - weights[name]).max() < 2e-6


def test_state_goes_there_and_back():
    weights = {"a": mx.ones((2,)), "b": mx.ones((3,))}

    def make() -> GroupedOptimizer:
        return GroupedOptimizer(weights, is_fast=lambda name: name == "b", factor=2.0)

    one, other = make(), make()
    updated = one.apply(weights, weights, mx.array(0.1))
    other.load_flat_state(one.flat_state())
    after, same = (optimizer.apply(weights, updated, mx.array(0.1)) for optimizer in (one, other))
    assert all(np.array_equal(np.array(after[name]), np.array(same[name])) for name in weights)
    with pytest.raises(StarflowError, match=r"lacks b/"):
        make().load_flat_state({k: v for k, v in one.flat_state().items() if not k.startswith("b/")})
    with pytest.raises(StarflowError, match=r"a/m is \[5\], the model's is \[2\]"):
        make().load_flat_state({**one.flat_state(), "a/m": mx.zeros((5,))})


def test_frozen_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.layers[0].freeze()
    assert set(trainable(model)) == {"layers.1.weight", "layers.1.bias"}
    before = np.array(model.layers[0].weight)
    assign(model, {name: mx.zeros_like(weight) for name, weight in trainable(model).items()})
    assert np.array_equal(np.array(model.layers[0].weight), before)
    assert not np.array(model.layers[1].weight).any()
