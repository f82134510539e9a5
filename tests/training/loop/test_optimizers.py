"""Every optimizer against its formula, written out in NumPy in float64."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.config import OPTIMIZERS
from mlx_starflow.training.loop.optimizers import GroupedOptimizer, embedding_names, multi_normalize

BETAS, DECAY, FACTOR = (0.9, 0.95), 0.1, 8.0
SHAPES = {"tall": (6, 3), "wide": (3, 5), "vector": (4,), "kernel": (2, 3, 3, 2), "embedding": (5, 4), "fast": (4, 3)}


def adam(w, g, state, step, lr, decay):
    state["m"] = BETAS[0] * state.get("m", 0) + (1 - BETAS[0]) * g
    state["v"] = BETAS[1] * state.get("v", 0) + (1 - BETAS[1]) * g**2
    m, v = state["m"] / (1 - BETAS[0] ** step), state["v"] / (1 - BETAS[1] ** step)
    return w - lr * decay * w - lr * m / (np.sqrt(v) + 1e-8)


def adafactor(w, g, state, step, lr, decay):
    """Without relative steps, parameter scale and momentum; the clipping threshold is 1."""
    beta = 1 - step**-0.8
    squared = g**2 + 1e-30
    if g.ndim >= 2:
        state["row"] = beta * state.get("row", 0) + (1 - beta) * squared.mean(axis=-1)
        state["column"] = beta * state.get("column", 0) + (1 - beta) * squared.mean(axis=-2)
        row = state["row"] / state["row"].mean(axis=-1, keepdims=True)
        update = g / np.sqrt(row[..., :, None] * state["column"][..., None, :])
    else:
        state["v"] = beta * state.get("v", 0) + (1 - beta) * squared
        update = g / np.sqrt(state["v"])
    update = update / max(1, np.sqrt((update**2).mean()))
    return w - lr * decay * w - lr * update


def muon(w, g, state, step, lr, decay):
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * g
    x = 0.05 * g + 0.95 * state["v"]
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return w - lr * decay * w - lr * 0.2 * np.sqrt(max(w.shape)) * x


def sinkgd(w, g, state, step, lr, decay):
    for _ in range(5):
        g = np.sqrt(g.shape[1]) * g / np.linalg.norm(g, axis=1, keepdims=True)
        g = np.sqrt(g.shape[0]) * g / np.linalg.norm(g, axis=0, keepdims=True)
    return w - lr * decay * w - 0.05 * lr * g


def make(weights, kind):
    return GroupedOptimizer(
        weights,
        kind=kind,
        betas=BETAS,
        weight_decay=DECAY,
        is_fast=lambda name: name == "fast",
        factor=FACTOR,
        embeddings={"embedding"},
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_its_formula(kind):
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    found = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    optimizer = make(found, kind)
    states = {name: {} for name in weights}
    for step in range(1, 6):
        lr = 0.01 * step
        gradients = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        found = optimizer.apply({n: mx.array(g) for n, g in gradients.items()}, found, mx.array(lr))
        for name, g in gradients.items():
            rule = {"adamw": adam, "adafactor": adafactor, "muon": adam, "sinkgd": adam}[kind]
            if kind in ("muon", "sinkgd") and name in ("tall", "wide"):
                rule = {"muon": muon, "sinkgd": sinkgd}[kind]
            rate, decay = (FACTOR * lr, 0.0) if name == "fast" else (lr, DECAY)
            weights[name] = rule(weights[name], g.astype(np.float64), states[name], step, rate, decay)
            assert np.abs(np.array(found[name]) - weights[name]).max() < 5e-6, (name, step)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_goes_there_and_back(kind):
    weights = {name: mx.ones(shape) for name, shape in SHAPES.items()}
    rng = np.random.default_rng(1)
    gradients = {n: mx.array(rng.standard_normal(shape).astype(np.float32)) for n, shape in SHAPES.items()}
    one, other = make(weights, kind), make(weights, kind)
    updated = one.apply(gradients, weights, mx.array(0.1))
    other.load_flat_state(one.flat_state())
    after, same = (optimizer.apply(gradients, updated, mx.array(0.1)) for optimizer in (one, other))
    assert all(np.array_equal(np.array(after[name]), np.array(same[name])) for name in weights)


def test_state_sizes():
    """What the low-memory optimizers are for: numbers kept for a matrix [m, n]."""
    weights = {"matrix": mx.ones((30, 20))}
    kept = {}
    for kind in OPTIMIZERS:
        state = make(weights, kind).flat_state()
        kept[kind] = sum(array.size for name, array in state.items() if name.startswith("matrix"))
    assert kept == {"adamw": 1200, "adafactor": 50, "muon": 600, "sinkgd": 0}


def test_state_of_another_optimizer_is_refused():
    weights = {"matrix": mx.ones((3, 2))}
    with pytest.raises(StarflowError, match="the optimizer's state"):
        make(weights, "muon").load_flat_state(make(weights, "adamw").flat_state())


def test_rows_and_columns_are_normalized():
    gradient = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32) * np.logspace(-6, 3, 30)
    found = np.array(multi_normalize(mx.array(gradient.astype(np.float32))))
    assert np.abs(np.sqrt((found**2).mean(axis=0)) - 1).max() < 1e-5
    assert np.abs(np.sqrt((found**2).mean(axis=1)) - 1).max() < 1e-2
    gradient[3], gradient[:, 5] = 0, 0
    found = np.array(multi_normalize(mx.array(gradient.astype(np.float32))))
    assert np.isfinite(found).all() and not found[3].any() and not found[:, 5].any()


def test_embeddings_are_found():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
    assert embedding_names(model) == {"layers.0.weight"}
