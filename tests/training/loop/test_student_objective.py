"""What students are trained with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from helpers.students import tiny_student
from helpers.tiny_flows import tiny_case

from mlx_starflow.training.loop.student_objective import student_error, student_errors, student_loss

GRID = (2, 3)


def batch_of(tiny, **more: mx.array) -> dict[str, mx.array]:
    draws = mx.random.normal((5, 2, 6, 2), key=mx.random.key(4))
    states = mx.stack([draws[2], draws[3], draws[4]], axis=1)
    return {"noise": draws[0], "clean": draws[1], "states": states, "condition": tiny.text, **more}


def test_an_inverse_student_learns_all_states_and_the_data():
    tiny = tiny_case("softplus")
    student = tiny_student(tiny.flow, scales=(1.0, 2.0, 1.0, 0.5))
    batch = batch_of(tiny)
    outputs = student(batch["noise"], GRID, tiny.text)
    targets = [*(batch["states"][:, number] for number in range(3)), batch["clean"]]
    own = [
        float((((output - target) / scale) ** 2).mean())
        for output, target, scale in zip(outputs, targets, (1.0, 2.0, 1.0, 0.5), strict=True)
    ]
    loss, metrics = student_loss(student, batch, GRID)
    assert np.isclose(loss, sum(own[:3]) / 3 + own[3], rtol=1e-5)
    assert np.isclose(metrics["sample"], own[2], rtol=1e-5) and np.isclose(metrics["clean"], own[3], rtol=1e-5)
    assert np.allclose(student_error(student, batch, GRID).mean(), own[3], rtol=1e-5)


def test_what_a_student_is_fed_with_again_is_its_own_sample_without_gradient():
    tiny = tiny_case("softplus")
    student = tiny_student(tiny.flow)
    batch = batch_of(tiny, refined=mx.ones(2))
    before = student(batch["noise"], GRID, tiny.text)[-2]
    again = student(batch["noise"], GRID, tiny.text, before)
    errors = student_errors(student, batch, GRID)
    assert np.allclose(errors[-1], mx.square(again[-1] - batch["clean"]).mean(axis=(1, 2)), rtol=1e-5)

    def fed(weight: mx.array) -> mx.array:
        return student_errors(student, {**batch, "noise": weight * batch["noise"]}, GRID)[-1].sum()

    def held(weight: mx.array) -> mx.array:
        outputs = student(weight * batch["noise"], GRID, tiny.text, before)
        return mx.square(outputs[-1] - batch["clean"]).mean(axis=(1, 2)).sum()

    one = mx.array(1.0)
    assert np.isclose(mx.grad(fed)(one), mx.grad(held)(one), rtol=1e-4)


def test_matching_is_the_textbook_loss():
    tiny = tiny_case("softplus")
    student = tiny_student(tiny.flow, "matching", scales=(2.0,))
    batch = batch_of(tiny, time=mx.array([0.25, 0.75]))
    t = np.array([0.25, 0.75]).reshape(2, 1, 1)
    x, z = np.array(batch["clean"]), np.array(batch["noise"])
    between = mx.array((t * x + (1 - t) * z).astype(np.float32))
    velocity = np.array(student(between, GRID, tiny.text, time=batch["time"])[0])
    loss, metrics = student_loss(student, batch, GRID)
    assert np.isclose(loss, (((velocity - (x - z)) / 2) ** 2).mean(), rtol=1e-5)
    assert np.isclose(metrics["velocity"], loss)


def test_near_pairs_weigh_more():
    tiny = tiny_case("softplus")
    student = tiny_student(tiny.flow, "matching")
    batch = batch_of(tiny, time=mx.array([0.25, 0.75]))
    errors = np.array(student_errors(student, batch, GRID)[0])
    cost = np.square(np.array(batch["clean"] - batch["noise"])).mean(axis=(1, 2))
    weight = np.exp(-cost / 0.5) / np.exp(-cost / 0.5).mean()
    loss, _ = student_loss(student, batch, GRID, transport=0.5)
    assert np.isclose(loss, (weight * errors).mean(), rtol=1e-4)
