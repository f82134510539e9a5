"""Videos frame by frame: the same as at once, from given frames, and longer than the model's window."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.errors import StarflowError
from mlx_starflow.sampling import (
    Certificate,
    JacobiSettings,
    RollingSettings,
    SamplingTrace,
    certify,
    denoise,
    denoise_frames,
    sample,
    sample_frames,
)
from mlx_starflow.sampling.certificate import FrameCertifier, certify_each
from mlx_starflow.sampling.methods import for_videos
from mlx_starflow.sampling.video import windows

EXACT = JacobiSettings(block_size=8, threshold=1e-9)


def whole(frames) -> mx.array:
    return mx.concatenate(list(frames), axis=1)


def distance(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return mx.abs(a - b).max().item()


def gaussian(key: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key))


# ---- the official release


@pytest.mark.parametrize("name, guidance", [("reverse", 0.0), ("reverse_cfg", 2.0)])
@pytest.mark.parametrize("method", ["sequential", RollingSettings(30, 1e-5, "previous", 24)], ids=str)
def test_golden_videos(golden, name, guidance, method):
    case = golden("t2v")
    given = (case["noise"], case["y"], case["y_null"] if guidance else None, guidance, method)
    assert case.error(sample(case.flow, *given), name) < 2e-4
    for count in (1, 2, 9):
        assert case.error(whole(sample_frames(case.flow, *given, frames_at_once=count)), name) < 2e-4


def test_golden_jacobi(golden):
    case = golden("t2v")
    x = sample(case.flow, case["noise"], case["y"], case["y_null"], 2.0, EXACT)
    assert case.error(x, "jacobi_cfg") < 2e-4


def test_golden_image_to_video(golden):
    case = golden("t2v")
    first = case["i2v_first"]
    frames = list(sample_frames(case.flow, case["noise"], case["y"], case["y_null"], 2.0, EXACT, given=first))
    assert frames[0].tolist() == first.tolist()
    assert case.error(whole(frames), "i2v_jacobi_cfg") < 2e-4


def test_golden_longer_than_the_window(golden):
    case = golden("t2v")
    condition = (case["y"], case["y_null"], 2.0, EXACT)
    frames = sample_frames(case.flow, case["long_noise"], *condition, window=5, context=2)
    assert case.error(whole(frames), "long_jacobi_cfg") < 2e-4


def test_golden_denoiser(golden):
    case = golden("t2v")
    x, text = case["x"], case["y"]
    assert case.relative_error((x - denoise(case.flow, x, text)) / 0.3, "denoiser") < 1e-4
    frame = x[:, 0]
    assert case.relative_error((frame - denoise(case.flow, frame, text)) / 0.3, "denoiser_image") < 1e-4


# ---- one frame after another


def test_frames_come_as_soon_as_they_are_there(golden):
    """Of the sequential evaluations of the deep block, only those of the frames so far are done."""
    case = golden("t2v")
    asked = []

    class Noise:
        shape = case["noise"].shape

        def __getitem__(self, index):
            asked.append(index)
            return case["noise"][index]

    stream = sample_frames(case.flow, Noise(), case["y"], window=2, context=1)
    next(stream), next(stream)
    assert asked == [(slice(None), slice(0, 2))]
    next(stream)
    assert asked[1:] == [(slice(None), slice(2, 3))]


def test_the_denoiser_waits_for_no_more_than_it_sees(golden):
    """Eight layers that look one frame ahead each: frame 0 of 12 needs frames 0 to 8."""
    case = golden("t2v")
    x = mx.concatenate([case["x"], case["x"][:, ::-1], case["x"][:, :2]], axis=1)
    taken = []

    def frames():
        for index in range(12):
            taken.append(index)
            yield x[:, index : index + 1]

    stream = denoise_frames(case.flow, frames(), case["y"], 12)
    first = next(stream)
    assert len(taken) == 9
    assert distance(whole([first, *stream]), denoise(case.flow, x, case["y"])) < 1e-5
    changed = mx.array(x)
    changed[:, 9:] += 1.0
    assert distance(denoise(case.flow, changed, case["y"])[:, :1], first) < 1e-5
    changed[:, 1] += 1.0
    assert distance(denoise(case.flow, changed, case["y"])[:, :1], first) > 1e-2


def test_long_videos_are_cleaned_window_by_window(golden):
    """Each window of 5 begins with the 2 frames before it that are clean already, as the release does it."""
    case = golden("t2v")
    noisy = case["long_noise"]
    expected = np.array(noisy)
    for start, new, stop in ((0, 0, 5), (3, 5, 8)):
        window = denoise(case.flow, mx.array(expected[:, start:stop]), case["y"])
        expected[:, new:stop] = np.array(window)[:, new - start :]
    cleaned = whole(denoise_frames(case.flow, iter([noisy[:, :3], noisy[:, 3:]]), case["y"], 8, window=5))
    assert np.abs(np.array(cleaned) - expected).max() < 1e-5


def glances(flow, x, text, **options):
    """What is yielded, and the glances by their frames' numbers, with the frames that had been asked for."""
    taken, found = [], []

    def frames():
        for index in range(x.shape[1]):
            taken.append(index)
            yield x[:, index : index + 1]

    cleaned = whole(
        denoise_frames(
            flow,
            frames(),
            text,
            x.shape[1],
            glance=lambda number, look: found.append((number, look(), taken[-1])),
            **options,
        )
    )
    return cleaned, found


def test_a_glance_at_the_first_frame_is_it_alone(golden):
    case = golden("t2v")
    x = mx.concatenate([case["x"], case["x"][:, ::-1], case["x"][:, :2]], axis=1)
    cleaned, found = glances(case.flow, x, case["y"])
    assert mx.array_equal(cleaned, whole(denoise_frames(case.flow, iter([x]), case["y"], 12)))
    assert [(number, taken) for number, _, taken in found] == [(n, n) for n in range(12)]
    assert distance(found[0][1], denoise(case.flow, x[:, :1], case["y"])) < 1e-5
    errors = [distance(glance, cleaned[:, n : n + 1]) for n, glance, _ in found]
    assert max(errors) > 1e-3  # they are previews
    assert max(errors) < 0.5 * mx.abs(cleaned).max().item()


def test_a_glance_without_anything_to_look_ahead_to_is_exact():
    tiny = tiny_case("frames")
    tiny.flow.denoiser.config = replace(tiny.flow.denoiser.config, look_ahead=0)
    cleaned, found = glances(tiny.flow, tiny.x, tiny.text)
    assert distance(whole(glance for _, glance, _ in found), cleaned) < 1e-5


def test_a_glance_in_one_layer_is_the_end_of_a_video():
    tiny = tiny_case("frames")
    tiny.flow.denoiser.attn_blocks = tiny.flow.denoiser.attn_blocks[:1]
    _, found = glances(tiny.flow, tiny.x, tiny.text)
    for number, glance, _ in found:
        ended = denoise(tiny.flow, tiny.x[:, : number + 1], tiny.text)
        assert distance(glance, ended[:, -1:]) < 1e-5


def test_glances_in_windows(golden):
    case = golden("t2v")
    cleaned, found = glances(case.flow, case["long_noise"], case["y"], window=5)
    assert [number for number, _, _ in found] == list(range(8))
    plain = whole(denoise_frames(case.flow, iter([case["long_noise"]]), case["y"], 8, window=5))
    assert mx.array_equal(cleaned, plain)


def test_a_glance_without_a_learned_denoiser_is_the_noisy_frame():
    tiny = tiny_case("frames")
    tiny.flow.pop("learnable_self_denoiser")
    cleaned, found = glances(tiny.flow, tiny.x, tiny.text)
    assert mx.array_equal(whole(glance for _, glance, _ in found), tiny.x)
    assert distance(cleaned, denoise(tiny.flow, tiny.x, tiny.text)) < 1e-5


def test_without_a_learned_denoiser_the_score_cleans():
    tiny = tiny_case("frames")
    tiny.flow.pop("learnable_self_denoiser")
    cleaned = whole(denoise_frames(tiny.flow, iter([tiny.x]), tiny.text, 2))
    assert distance(cleaned, denoise(tiny.flow, tiny.x, tiny.text)) < 1e-6


def test_evaluations_are_counted():
    tiny, trace = tiny_case("frames"), SamplingTrace()
    z = gaussian(0, 2, 4, 2, 3, 2)
    list(sample_frames(tiny.flow, z, tiny.text, given=tiny.x[:, :1], window=2, context=1, trace=trace))
    assert trace.evaluations == [18, 18, 18]
    at_once = SamplingTrace()
    list(sample_frames(tiny.flow, z, tiny.text, given=tiny.x[:, :1], frames_at_once=9, trace=at_once))
    assert at_once.evaluations == [18, 6, 6]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_frames_can_be_given(count):
    """The first frames of a sample, given, lead to the same sample."""
    tiny = tiny_case("frames")
    z = gaussian(1, 2, 4, 2, 3, 2)
    x = sample(tiny.flow, z, tiny.text, tiny.null_text, 1.0)
    assert certify(tiny.flow, x, z, tiny.text, tiny.null_text, 1.0).max < 1e-4
    other = mx.concatenate([z[:, :count] + 7, z[:, count:]], axis=1)
    given = x[:, :count]
    again = whole(sample_frames(tiny.flow, other, tiny.text, tiny.null_text, 1.0, given=given))
    assert distance(again, x) < 1e-3


@pytest.mark.parametrize("method", ["jacobi", "rolling"])
def test_methods_by_name(golden, method):
    case = golden("t2v")
    x = whole(sample_frames(case.flow, case["noise"], case["y"], case["y_null"], 2.0, method))
    settings = for_videos(method, 24)
    again = whole(sample_frames(case.flow, case["noise"], case["y"], case["y_null"], 2.0, settings))
    assert distance(x, again) == 0
    at_once = sample(case.flow, case["noise"], case["y"], case["y_null"], 2.0, settings)
    assert distance(sample(case.flow, case["noise"], case["y"], case["y_null"], 2.0, method), at_once) == 0
    assert settings in (JacobiSettings(block_size=32), RollingSettings(guess="previous", lag=24))


# ---- certificates


@pytest.mark.parametrize("options", [{}, {"window": 5, "context": 2}, {"window": 3, "context": 1}], ids=str)
@pytest.mark.parametrize("given", [0, 1, 3])
def test_certificates_of_long_and_of_given_videos(golden, options, given):
    """What was sampled is certified, wherever it is; what was given is read, and what its noise would be is not."""
    case = golden("t2v")
    z, condition = case["long_noise"], (case["y"], case["y_null"], 2.0)
    start = case["x"][:, :given] if given else None
    x = whole(sample_frames(case.flow, z, *condition, given=start, **options))
    found = certify_each(case.flow, x, z, *condition, given=given, **options)
    assert len(found) == x.shape[0] and max(each.max for each in found) < 1e-3
    total = certify(case.flow, x, z, *condition, given=given, **options)
    assert total.max == max(each.max for each in found)
    for frame in (given, 7):
        wrong = mx.array(z)
        wrong[0, frame] += 0.25
        changed = certify_each(case.flow, x, wrong, *condition, given=given, **options)
        assert changed[0].max == pytest.approx(0.25, abs=1e-3) and changed[1:] == found[1:]
        count = x.shape[1] - given
        assert changed[0].rms == pytest.approx(0.25 / count**0.5, abs=1e-3)
    if given:
        other = mx.array(z)
        other[:, :given] += 7
        assert certify_each(case.flow, x, other, *condition, given=given, **options) == found


def test_a_long_video_has_no_certificate_in_one_window(golden):
    case = golden("t2v")
    condition = (case["y"], case["y_null"], 2.0)
    x = whole(sample_frames(case.flow, case["long_noise"], *condition, window=5, context=2))
    assert certify(case.flow, x, case["long_noise"], *condition).max > 1e-2
    official = certify(case.flow, case["long_jacobi_cfg"], case["long_noise"], *condition, window=5, context=2)
    assert official.max < 1e-3


def test_certifying_frames_as_they_come():
    """It takes the frames and the noise of one window, and the last one is certified when it is asked for."""
    asked, certified = [], []

    class Noise:
        shape = (1, 12, 1, 1, 1)

        def __getitem__(self, index):
            asked.append(index[1])
            return mx.zeros((1, index[1].stop - index[1].start, 1, 1, 1))

    def part(x, z, given):
        assert x.shape == z.shape
        certified.append((x.flatten().tolist(), given))
        return [Certificate(float(len(certified)), 1.0 / len(certified))]

    certifier = FrameCertifier(12, Noise(), part, given=6, window=5, context=2)
    for frame in range(12):
        certifier.push(mx.full((1, 1, 1, 1, 1), frame))
    assert certified == [([3, 4, 5, 6, 7], 3), ([6, 7, 8, 9, 10], 2)]
    (found,) = certifier.certificates()
    assert certified[2:] == [([9, 10, 11], 2)]
    assert asked == [slice(6, 8), slice(8, 11), slice(11, 12)]
    assert found == Certificate(3.0, pytest.approx(((2 * 1 + 3 / 4 + 1 / 9) / 6) ** 0.5))


def test_mistakes_of_certificates():
    tiny = tiny_case("frames")
    for x, z, given in ((tiny.x, tiny.x[:, :1], 0), (tiny.x, tiny.x, tiny.x.shape[1]), (tiny.x, tiny.x, -1)):
        with pytest.raises(StarflowError, match="noise of as many frames, and one that was not given"):
            certify(tiny.flow, x, z, tiny.text, given=given)
    with pytest.raises(StarflowError, match="context must be 1 to 0"):
        certify(tiny.flow, tiny.x, tiny.x, tiny.text, window=1)


def test_windows():
    assert windows(21, None) == [(0, 0, 21)]
    assert windows(21, 21, 99) == [(0, 0, 21)]
    assert windows(8, 5, 2) == [(0, 0, 5), (3, 5, 8)]
    assert windows(7, 3) == [(0, 0, 3), (1, 3, 4), (2, 4, 5), (3, 5, 6), (4, 6, 7)]
    assert windows(9, 4, 1)[-1] == (6, 7, 9)


def test_mistakes():
    tiny = tiny_case("frames")
    z = gaussian(0, 2, 4, 2, 3, 2)
    for expected, options in (
        ("context must be 1 to 1", {"window": 2, "context": 2}),
        ("context must be 1 to 1", {"window": 2, "context": 0}),
        ("at most 2 frames", {"given": mx.repeat(tiny.x[:, :1], 3, axis=1), "window": 2}),
        ("2 times at most 4 frames", {"given": tiny.x[:1]}),
    ):
        with pytest.raises(StarflowError, match=expected):
            list(sample_frames(tiny.flow, z, tiny.text, **options))
    with pytest.raises(StarflowError, match=r"reads \[batch, frames, height, width, 2\]"):
        list(sample_frames(tiny.flow, z[..., :1], tiny.text))
    pictures = tiny_case("softplus")
    with pytest.raises(StarflowError, match=r"reads \[batch, height, width, 2\]"):
        list(sample_frames(pictures.flow, z, pictures.text))
    broken = mx.where(mx.arange(4)[:, None, None, None] == 2, float("nan"), z)
    stream = sample_frames(tiny.flow, broken, tiny.text)
    next(stream), next(stream)
    with pytest.raises(StarflowError, match="a frame is not finite"):
        next(stream)
