"""Several conditions at once give what each of them gives by itself."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.model_directories import write_class_model, write_image_model, write_video_model

from mlx_starflow.likelihood.conditions import ConditionedFlow
from mlx_starflow.likelihood.nll import token_nats
from mlx_starflow.pipelines import open_model


@pytest.mark.parametrize("write, frames", [(write_image_model, 0), (write_class_model, 0), (write_video_model, 3)])
def test_it_is_the_likelihood_of_each(write, frames, tmp_path):
    pipe = open_model(write(tmp_path / "model"))
    image = 3 if write is write_class_model else 0
    shape = (5, 8, 8, image) if image else (5, *((frames,) if frames else ()), *pipe.latent_shape())
    x = mx.array(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    prompts = ["0", "2", "1", ""] if image else ["a cat", "a red apple", "", "a dog on a hill"]
    conditions = pipe.conditions(prompts, shape)
    found = ConditionedFlow(pipe.flow, conditions, shape).nats(x, batch_size=3)
    for number in range(len(prompts)):
        one = conditions[mx.array([number] * 5)]
        expected = token_nats(pipe.flow, x, one).sum(axis=(1, 2))
        np.testing.assert_allclose(found[:, number], expected, rtol=1e-5, atol=1e-3)
    assert np.ptp(found, axis=1).min() > 1e-3
