"""Tuning: the plan holds its certificate, and the noise of half precision is not taken for a fault."""

from __future__ import annotations

import ast

import mlx.core as mx
import pytest
from helpers.students import student_config, tiny_student
from helpers.tiny_flows import tiny_case
from mlx.utils import tree_map

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.student import Student
from mlx_starflow.sampling import (
    FramewiseSettings,
    RollingSettings,
    SamplingTrace,
    SequentialSettings,
    certify,
    sample,
)
from mlx_starflow.sampling.methods import FRAME_GUESSES
from mlx_starflow.sampling.trials import ALIKE, Trial, cheapest, windows
from mlx_starflow.sampling.tuning import tune


@pytest.mark.parametrize("family", ["softplus", "shifted", "identity_block", "no_text", "tarflow"])
def test_a_plan_holds_its_certificate(family):
    tiny = tiny_case(family)
    guidance = 0.0 if tiny.text is None else 0.5
    z = mx.random.normal(tiny.noise(tiny.flow(tiny.x, tiny.text).z).shape, key=mx.random.key(0))
    args = (tiny.flow, z, tiny.text, tiny.null_text, guidance)
    lines: list[str] = []
    plan = tune(*args, tolerance=5e-3, report=lines.append)
    assert plan.tolerance == 5e-3
    assert len(plan.blocks) == len(tiny.flow.blocks)
    for index in range(2):
        one = [None if value is None else value[index : index + 1] for value in (z, tiny.text)]
        trace = SamplingTrace()
        x = sample(tiny.flow, *one, tiny.null_text, guidance, plan, trace=trace)
        assert certify(tiny.flow, x, *one, tiny.null_text, guidance).max <= 5e-3
    assert lines[0].startswith("sequential: ")
    assert any("rolling window" in line for line in lines)


class Knowing(Student):
    """It knows what the flow makes of noise of six tokens."""

    def taught_by(self, flow: STARFlow) -> Knowing:
        object.__setattr__(self, "teacher", flow)
        return self

    def __call__(self, tokens, grid, condition=None, previous=None, time=None, gradient_checkpointing=False):
        trace = SamplingTrace(keep_states=True)
        sample(self.teacher, self.data(tokens, (1, 2, 3, 2)), condition, trace=trace)
        return [*map(self.teacher.tokens, trace.states), tokens]


@pytest.mark.parametrize("knowing", [True, False])
def test_drafts_are_part_of_a_plan_where_they_save_more_than_they_cost(knowing):
    tiny = tiny_case("softplus")
    student = Knowing(student_config(tiny.flow)).taught_by(tiny.flow) if knowing else tiny_student(tiny.flow)
    z = mx.random.normal(tiny.x.shape, key=mx.random.key(0))
    plan = tune(tiny.flow, z, tiny.text, tolerance=5e-3, least="evaluations", student=student)
    assert plan.drafts == knowing
    if knowing:
        trace = SamplingTrace()
        x = sample(tiny.flow, z[:1], tiny.text[:1], method=plan, student=student, trace=trace)
        assert trace.evaluations == [1, 1, 1]
        assert certify(tiny.flow, x, z[:1], tiny.text[:1]).max <= 5e-3
        assert not plan.without_drafts().drafts


def test_half_precision():
    tiny = tiny_case("softplus")
    tiny.flow.update(tree_map(lambda w: w.astype(mx.bfloat16), tiny.flow.parameters()))
    z = mx.random.normal(tiny.x.shape, key=mx.random.key(0))
    lines: list[str] = []
    plan = tune(tiny.flow, z, tiny.text, tolerance=1e-9, report=lines.append)
    assert 1e-9 < plan.tolerance < 0.2
    assert any("all that this precision gives" in line for line in lines)
    assert plan.precision == "bfloat16"
    assert plan.tolerance > 2 * plan.measured["noise_floor"] > 1e-3
    one = tiny.flow, z[:1], tiny.text[:1]
    assert certify(tiny.flow, sample(*one, method=plan), *one[1:]).max <= plan.tolerance


def test_in_float32_the_tolerance_is_what_was_asked_for():
    tiny = tiny_case("softplus")
    plan = tune(tiny.flow, mx.random.normal(tiny.x.shape, key=mx.random.key(0)), tiny.text, tolerance=5e-3)
    assert plan.precision == "float32" and plan.tolerance == 5e-3 and "noise_floor" not in plan.measured


def test_tolerance_is_checked():
    tiny = tiny_case("softplus")
    with pytest.raises(StarflowError, match="tolerance must be greater than 0"):
        tune(tiny.flow, tiny.x, tiny.text, tolerance=0.0)


def test_fewest_evaluations():
    tiny = tiny_case("softplus")
    z = mx.random.normal(tiny.x.shape, key=mx.random.key(0))
    lines: list[str] = []
    plan = tune(tiny.flow, z, tiny.text, tolerance=5e-3, least="evaluations", report=lines.append)
    assert len(plan.blocks) == len(tiny.flow.blocks)
    tried: list[int] = []
    for line in lines:
        if line.startswith("block") and "but residual" not in line:
            tried.append(int(line.split(": ")[2].split()[0]))
        elif line.startswith("-> "):
            assert int(line.split(": ")[2].split()[0]) <= ALIKE * min(tried)
            tried.clear()


def test_the_other_cost_decides_between_what_costs_alike():
    costs = [(100, 1.0), (50, 1.1), (46, 2.0), (40, 5.0)]
    trials = [Trial(0, SequentialSettings(), evaluations, seconds, 0.0) for evaluations, seconds in costs]
    assert cheapest(trials, "seconds").evaluations == 50
    assert cheapest(trials, "evaluations").evaluations == 46


@pytest.mark.parametrize("least", ["seconds", "evaluations"])
def test_a_plan_of_videos_holds_its_certificate(least):
    tiny = tiny_case("frames")
    z = mx.random.normal((2, 4, 2, 3, 2), key=mx.random.key(0))
    lines: list[str] = []
    args = (tiny.text, tiny.null_text, 0.5)
    plan = tune(tiny.flow, z, *args, tolerance=5e-3, least=least, report=lines.append)
    assert plan.frame == 6 and plan.measured["frames"] == 4 and plan.measured["certificate"] <= 5e-3
    assert "4 latent frames of 6 tokens" in lines and any("blocks of 32" in line for line in lines)
    count = sum(plan.measured["evaluations"])
    assert plan.measured["evaluations_per_frame"] == pytest.approx(count / 4, abs=0.02)
    for index in range(2):
        one = [None if value is None else value[index : index + 1] for value in (z, tiny.text)]
        x = sample(tiny.flow, *one, tiny.null_text, 0.5, plan)
        assert certify(tiny.flow, x, *one, tiny.null_text, 0.5).max <= 5e-3


def test_what_is_tried_for_videos(monkeypatch):
    """Windows of whole frames, first guesses from the frames before, and the first frame in a way of its own."""

    def cost(trial, least):
        settings = trial.settings.later if isinstance(trial.settings, FramewiseSettings) else trial.settings
        dear = not isinstance(settings, RollingSettings) or settings.window > 12
        return trial.evaluations + (1000 if dear else 0)

    monkeypatch.setattr(Trial, "cost", cost)
    tiny = tiny_case("frames")
    lines: list[str] = []
    plan = tune(tiny.flow, mx.random.normal((1, 4, 2, 3, 2)), tiny.text[:1], tolerance=5e-3, report=lines.append)
    deep = [line.split(": ")[1] for line in lines if line.startswith("block 2: ")]
    assert {f"rolling window of {width}, first guess noise" for width in (12, 24, 6)} < set(deep)
    assert {f"rolling window of 12, first guess {guess}" for guess in ("affine", *FRAME_GUESSES)} < set(deep)
    assert "first frame alone" in deep and deep[-1].startswith("first frame rolling window of 6, first guess ")
    assert all(isinstance(block, FramewiseSettings | RollingSettings) for block in plan.blocks)
    # Blocks that read each frame by itself have frames before them where these come one by one.
    shallow = [line.split(": ")[1] for line in lines if line.startswith("block 0: ")]
    assert shallow[shallow.index("frame by frame") + 2 :] == [
        f"rolling window of 6, first guess {guess}" for guess in FRAME_GUESSES
    ]
    assert not any(guess in line for guess in ("previous", "motion") for line in shallow[: -len(FRAME_GUESSES)])


def test_windows_of_whole_frames():
    assert windows(128, "seconds", 16) == [8, 16, 32, 64, 128]
    assert windows(96, "evaluations", 24) == [96, 48, 24, 16, 8]
    assert windows(20, "seconds", 5) == [10, 20]
    assert windows(24, "seconds", 12) == [8, 12, 24]
    assert windows(30, "seconds", 10) == [8, 10, 20, 30]


def test_windows_in_the_order_of_what_they_are_likely_to_cost():
    assert windows(256, "seconds") == [8, 16, 32, 64, 128, 256]
    assert windows(100, "evaluations") == [100, 64, 32, 16, 8]
    assert windows(5, "seconds") == windows(5, "evaluations") == [5]


@pytest.mark.parametrize("least", ["seconds", "evaluations"])
def test_what_tuning_takes(least):
    """Each block is sampled sequentially once, whatever is tried after that; and the plan says what all of it took."""
    tiny = tiny_case("tarflow")
    z = mx.random.normal(tiny.noise(tiny.flow(tiny.x, tiny.text).z).shape, key=mx.random.key(0))
    lines: list[str] = []
    plan = tune(tiny.flow, z, tiny.text, least=least, report=lines.append)
    trials = [line for line in lines if line.startswith("block ")]
    together = [line for line in lines if line.startswith("together: ")]
    sequential = [line for line in trials if ": sequential:" in line]
    assert len(sequential) == len(tiny.flow.blocks)
    spent = sum(int(line.split(": ")[2].split()[0]) for line in trials)
    spent += sum(sum(ast.literal_eval(line[len("together: ") : line.index("]") + 1])) for line in together)
    assert plan.measured["tuning_evaluations"] == spent
    assert lines[-1] == f"tuning took {spent} evaluations"


def test_windows_of_a_block_with_patches_of_its_own():
    """A block's windows go up to its own tokens, of which it may have more than the noise."""
    tiny = tiny_case("itarflow_patches")
    z = mx.random.normal(tiny.noise(tiny.flow(tiny.x).z).shape, key=mx.random.key(0))
    lengths = [block.config.num_patches for block in tiny.flow.blocks]
    assert len(set(lengths)) > 1
    lines: list[str] = []
    tune(tiny.flow, z, least="evaluations", report=lines.append)
    for index, length in enumerate(lengths):
        assert any(line.startswith(f"block {index}: rolling window of {length},") for line in lines)


def test_arguments_are_checked():
    tiny = tiny_case("softplus")
    with pytest.raises(StarflowError, match="least seconds or evaluations, not 'joules'"):
        tune(tiny.flow, tiny.x, tiny.text, least="joules")
