"""Sampling with students, and drafts: whatever a student guesses, the window ends at the flow's own sample."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.students import tiny_student
from helpers.tiny_flows import tiny_case

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.student import Student
from mlx_starflow.sampling import GuidedFlow, RollingSettings, SamplingPlan, SamplingTrace, certify, sample
from mlx_starflow.sampling.sampler import invert_block
from mlx_starflow.sampling.student import drafts, sample_student

DRAFTED = RollingSettings(guess="draft", tolerance=1e-6)


def of_noise(family: str = "softplus"):
    tiny = tiny_case(family)
    z = mx.random.normal(tiny.noise(tiny.flow(tiny.x, tiny.text).z).shape, key=mx.random.key(3))
    return tiny, z


@pytest.mark.parametrize("family", ["softplus", "shifted", "patches", "no_text", "identity_block", "tarflow"])
def test_drafts_of_a_student_that_knows_nothing_end_at_the_sequential_sample(family):
    tiny, z = of_noise(family)
    trace = SamplingTrace()
    exact = sample(tiny.flow, z, tiny.text)
    drafted = sample(tiny.flow, z, tiny.text, method=DRAFTED, student=tiny_student(tiny.flow), trace=trace)
    assert np.allclose(drafted, exact, atol=1e-4)
    assert trace.student_evaluations == 1
    assert certify(tiny.flow, drafted, z, tiny.text).max < 1e-4


def test_drafts_with_guidance():
    tiny, z = of_noise()
    student = tiny_student(tiny.flow)
    exact = sample(tiny.flow, z, tiny.text, tiny.null_text, 1.0)
    drafted = sample(tiny.flow, z, tiny.text, tiny.null_text, 1.0, "draft", student=student)
    assert certify(tiny.flow, drafted, z, tiny.text, tiny.null_text, 1.0).max < 1e-2
    assert np.allclose(drafted, exact, atol=1e-2)


def test_a_right_draft_takes_one_evaluation():
    tiny, z = of_noise()
    guided = GuidedFlow(tiny.flow, z.shape, tiny.text)
    tokens = tiny.flow.noise_tokens(z)
    for index in guided.active():
        exact = guided.decoder(index, *tokens.shape[:2])
        data = invert_block(exact, tokens, RollingSettings(tolerance=1e-6))
        decoder = guided.decoder(index, *tokens.shape[:2])
        decoder.draft = decoder.block.permute(data)
        assert np.allclose(invert_block(decoder, tokens, RollingSettings(guess="draft", tolerance=1e-4)), data)
        assert decoder.evaluations == 1 < exact.evaluations
        tokens = data


def test_drafts_are_what_blocks_add_by_the_heads_in_the_order_of_sampling():
    tiny, z = of_noise("identity_block")
    student = tiny_student(tiny.flow)
    found = drafts(student, tiny.flow, z, tiny.text)
    outputs = student(student.tokens(z), student.grid(z.shape), tiny.text)
    assert list(found) == [2, 0]
    assert mx.array_equal(found[2], outputs[0] - student.tokens(z))
    assert mx.array_equal(found[0], outputs[1] - outputs[0])


def test_a_draft_is_added_to_what_the_block_reads():
    tiny, z = of_noise()
    trace = SamplingTrace(keep_states=True)
    sample(tiny.flow, z, tiny.text, trace=trace)
    exact = [tiny.flow.tokens(state) for state in trace.states]

    class Shifted(Student):
        """It knows the deep block, and of the others what they add to a state that is off by one."""

        def __call__(self, tokens, grid, condition=None, previous=None, time=None, gradient_checkpointing=False):
            return [exact[0] + 1, exact[1] + 1, exact[2] + 1, tokens]

    again = SamplingTrace()
    student = Shifted(tiny_student(tiny.flow).config)
    shallow = RollingSettings(guess="draft")
    plan = SamplingPlan((shallow, shallow, DRAFTED), 1e-2, {})
    sample(tiny.flow, z, tiny.text, method=plan, student=student, trace=again)
    assert again.evaluations[0] > 1 and again.evaluations[1:] == [1, 1]


def test_an_inverse_student_is_fed_with_its_own_sample():
    tiny, z = of_noise()
    student = tiny_student(tiny.flow)
    tokens, grid = student.tokens(z), student.grid(z.shape)
    once = student(tokens, grid, tiny.text)
    twice = student(tokens, grid, tiny.text, once[-2])
    made = sample_student(student, z, tiny.text, 2)
    assert made.evaluations == 2
    assert np.allclose(made.data, student.data(twice[-1], z.shape), atol=1e-5)
    assert np.allclose(made.states[-1], twice[-2], atol=1e-5)
    assert np.allclose(sample_student(student, z, tiny.text).data, student.data(once[-1], z.shape), atol=1e-5)


class Line(Student):
    """Its velocity is the time, so that x after a while t is x + t^2 / 2, which Heun's steps but the last give."""

    def __call__(self, tokens, grid, condition=None, previous=None, time=None, gradient_checkpointing=False):
        return [mx.broadcast_to(time[:, None, None], tokens.shape)]


@pytest.mark.parametrize(("solver", "steps", "moved", "evaluations"), [("euler", 4, 0.375, 4), ("heun", 4, 0.46875, 7)])
def test_steps_of_a_matching_student(solver, steps, moved, evaluations):
    tiny, z = of_noise()
    student = Line(tiny_student(tiny.flow, "matching").config)
    made = sample_student(student, z, tiny.text, steps, solver=solver)
    assert np.allclose(made.data, z + moved, atol=1e-6)
    assert made.evaluations == evaluations and made.states == []


def test_what_is_refused():
    tiny, z = of_noise()
    matching = tiny_student(tiny.flow, "matching")
    with pytest.raises(StarflowError, match="give a student"):
        sample(tiny.flow, z, tiny.text, method="draft")
    with pytest.raises(StarflowError, match="need an inverse student"):
        sample(tiny.flow, z, tiny.text, method="draft", student=matching)
    with pytest.raises(StarflowError, match="another flow's"):
        sample(tiny.flow, z, tiny.text, method="draft", student=tiny_student(tiny.flow, scales=(1.0, 1.0)))
    with pytest.raises(StarflowError, match="1 to 1000 steps"):
        sample_student(matching, z, tiny.text, 0)
