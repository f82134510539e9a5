"""A student's network: its heads, what they see, and what it refuses."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.students import student_config, tiny_student
from helpers.tiny_flows import tiny_case, tiny_flow

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.student import Student, StudentConfig


@pytest.mark.parametrize("family", ["softplus", "patches", "no_text", "tarflow", "identity_block"])
def test_an_inverse_student_has_a_head_for_each_state_and_for_the_data(family):
    tiny = tiny_case(family)
    student = tiny_student(tiny.flow)
    z = tiny.noise(tiny.flow(tiny.x, tiny.text).z)
    tokens = student.tokens(z)
    assert mx.array_equal(tokens, tiny.flow.output_tokens(z))
    outputs = student(tokens, student.grid(z.shape), tiny.text)
    active = sum(not block.is_identity for block in tiny.flow.blocks)
    assert len(outputs) == active + 1 == student.config.states + 1
    assert all(output.shape == tokens.shape and output.dtype == mx.float32 for output in outputs)
    data = student.data(outputs[-1], z.shape)
    assert data.shape == tiny.x.shape
    assert mx.array_equal(tiny.flow.tokens(data), outputs[-1])


def test_heads_are_spread_over_the_layers():
    config = student_config(tiny_flow("softplus"), num_layers=6)
    assert config.depths == [2, 4, 6, 6]
    assert student_config(tiny_flow("softplus"), num_layers=1).depths == [1, 1, 1, 1]


def test_every_token_sees_all_others_and_the_text():
    tiny = tiny_case("softplus")
    student = tiny_student(tiny.flow)
    z = tiny.noise(tiny.flow(tiny.x, tiny.text).z)
    tokens, grid = student.tokens(z), student.grid(z.shape)
    plain = student(tokens, grid, tiny.text)[-1]
    last = mx.concatenate([tokens[:, :-1], tokens[:, -1:] + 1], axis=1)
    assert mx.abs(student(last, grid, tiny.text)[-1] - plain)[:, 0].max() > 1e-4
    assert mx.abs(student(tokens, grid, tiny.text + 1)[-1] - plain).max() > 1e-4
    assert mx.abs(student(tokens, grid, tiny.text, tokens)[-1] - plain).max() > 1e-4


def test_labels_and_none_of_them_are_told_apart():
    tiny = tiny_case("tarflow")
    student = tiny_student(tiny.flow, positions=4)
    z = mx.random.normal((3, 4, 4), key=mx.random.key(0))
    z = mx.broadcast_to(z[:1], z.shape)
    made = student(z, (2, 2), mx.array([0, 2, -1]))[-1]
    assert min(float(mx.abs(made[a] - made[b]).max()) for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-4
    assert mx.allclose(student(z, (2, 2))[-1][0], made[2], atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    tiny = tiny_case("softplus")
    student = tiny_student(tiny.flow)
    tokens = student.tokens(tiny.noise(tiny.flow(tiny.x, tiny.text).z))

    def gradient(checkpointing: bool) -> mx.array:
        def loss(x: mx.array) -> mx.array:
            return mx.square(student(x, (2, 3), tiny.text, gradient_checkpointing=checkpointing)[-1]).sum()

        return mx.grad(loss)(tokens)

    assert np.allclose(gradient(True), gradient(False), rtol=1e-4, atol=1e-4)


def test_a_new_student_says_nothing():
    tiny = tiny_case("softplus")
    student = Student(student_config(tiny.flow, "matching"))
    outputs = student(mx.ones((2, 6, 2)), (2, 3), tiny.text, time=mx.array([0.0, 1.0]))
    assert len(outputs) == 1 and mx.abs(outputs[0]).max().item() == 0


def test_configs_are_read_as_they_are_written():
    config = student_config(tiny_flow("softplus"), guidance=1.5, scales=(1.0, 2.0, 0.5, 0.25))
    assert StudentConfig.from_dict({"model_type": "student", **config.to_dict()}) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "kind must be inverse or matching"),
        ({"layout": "other"}, "layout must be starflow or tarflow"),
        ({"scales": (1.0,)}, "scales must hold one number a state and one of the data"),
        ({"scales": (1.0, 0.0)}, "scales must be numbers greater than 0"),
        ({"kind": "matching", "scales": (1.0, 1.0)}, "scales must hold one number"),
        ({"head_dim": 8}, "head_dim 8"),
        ({"num_layers": 0}, "num_layers must be a positive integer"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(StarflowError, match=message):
        student_config(tiny_flow("softplus"), **changes)


def test_what_does_not_fit():
    tiny = tiny_case("softplus")
    student = tiny_student(tiny.flow)
    with pytest.raises(StarflowError, match="another model's"):
        student.tokens(mx.zeros((1, 2, 3, 5)))
    with pytest.raises(StarflowError, match="reads text embeddings"):
        student(mx.zeros((1, 6, 2)), (2, 3))
    with pytest.raises(StarflowError, match="images of 4 tokens"):
        tiny_student(tiny_flow("tarflow"), positions=4)(mx.zeros((1, 9, 4)), (3, 3))
