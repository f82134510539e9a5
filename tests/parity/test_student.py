"""The MLX student against the PyTorch reference: both kinds, of flows that read text, classes or nothing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.students import tiny_student
from helpers.tiny_flows import tiny_case
from helpers.torch_reference import DEVICES, both, give_weights, relative, to_numpy
from mlx.utils import tree_flatten

from mlx_starflow.errors import StarflowError

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]

GRIDS = {"softplus": (2, 3), "no_text": (2, 3), "patches": (2, 2), "tarflow": (2, 2)}


@pytest.mark.parametrize("kind", ["inverse", "matching"])
@pytest.mark.parametrize("family", sorted(GRIDS))
def test_mlx_equals_the_reference(family, kind, device):
    from mlx_starflow.reference.student import Student as Reference

    tiny, grid, rng = tiny_case(family), GRIDS[family], np.random.default_rng(3)
    positions = grid[0] * grid[1] if family == "tarflow" else 0
    scales = (2.0,) if kind == "matching" else None
    changes = {"scales": scales} if scales else {}
    student = tiny_student(tiny.flow, kind, positions=positions, **changes)
    reference = give_weights(Reference(student.config), student, device)
    shape = (2, grid[0] * grid[1], student.config.in_channels)
    tokens = both(rng.standard_normal(shape, np.float32), device)
    text = both(None if tiny.text is None else np.array(tiny.text)[:2], device)
    more = {"previous": both(rng.standard_normal(shape, np.float32), device)}
    if kind == "matching":
        more = {"time": both(np.float32([0.1, 0.8]), device)}
    for given in ({}, more) if kind == "inverse" else (more,):
        ours = student(tokens[0], grid, text[0], **{name: pair[0] for name, pair in given.items()})
        theirs = reference(tokens[1], grid, text[1], **{name: pair[1] for name, pair in given.items()})
        assert len(ours) == len(theirs) == len(student.config.scales)
        assert max(relative(mine, other) for mine, other in zip(ours, theirs, strict=True)) < 1e-4

    def loss(parameters, x):
        student.update(parameters)
        outputs = student(x, grid, text[0], **{name: pair[0] for name, pair in more.items()})
        return sum(mx.square(output).mean() for output in outputs)

    sum(output.square().mean() for output in theirs).backward()
    gradients = dict(tree_flatten(mx.grad(loss)(student.trainable_parameters(), tokens[0])))
    assert gradients.keys() == dict(reference.named_parameters()).keys()
    for name, parameter in reference.named_parameters():
        expected = np.zeros(parameter.shape) if parameter.grad is None else to_numpy(parameter.grad)
        error = np.abs(to_numpy(gradients[name]) - expected).max()
        assert error < 1e-3 * max(np.abs(expected).max(), 1e-3), name


def test_a_new_student_says_nothing_and_wants_text(device):
    import torch

    from mlx_starflow.reference.student import Student as Reference

    tiny = tiny_case("softplus")
    reference = Reference(tiny_student(tiny.flow).config).to(device)
    tokens, text = torch.ones(2, 6, 2, device=device), both(np.array(tiny.text)[:2], device)[1]
    assert all(float(output.detach().abs().max()) == 0 for output in reference(tokens, (2, 3), text))
    with pytest.raises(StarflowError, match="this student reads text"):
        reference(tokens, (2, 3))
