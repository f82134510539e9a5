"""The rolling window: its tolerance holds by construction, its evaluations, its first guesses, given tokens."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.sampling import (
    FramewiseSettings,
    GuidedFlow,
    JacobiSettings,
    RollingSettings,
    SamplingOptions,
    SamplingTrace,
    SequentialSettings,
    sample,
    sample_frames,
)
from mlx_starflow.sampling.decoder import BlockDecoder
from mlx_starflow.sampling.first_guesses import FirstGuesses, FramePast
from mlx_starflow.sampling.jacobi import _advance
from mlx_starflow.sampling.noise_floor import NoiseFloor
from mlx_starflow.sampling.sampler import invert_block

EVERY = [
    SequentialSettings(),
    JacobiSettings(block_size=2, threshold=1e-13),
    RollingSettings(window=2, tolerance=1e-6),
    RollingSettings(window=99, tolerance=1e-6, guess="affine"),
    RollingSettings(window=3, tolerance=1e-6, guess="previous", lag=2),
    RollingSettings(window=5, tolerance=1e-6, guess="motion", lag=2),
    RollingSettings(window=2, tolerance=1e-6, guess="previous-affine", lag=1),
    RollingSettings(window=4, tolerance=1e-6, guess="motion-affine", lag=1),
    FramewiseSettings(SequentialSettings(), RollingSettings(4, 1e-6, "motion-affine", 2)),
    FramewiseSettings(RollingSettings(3, 1e-6), JacobiSettings(block_size=2, threshold=1e-13)),
]


def guided(tiny, weight: float = 0.7) -> GuidedFlow:
    shape = tiny.noise(tiny.flow(tiny.x, tiny.text).z).shape
    can = tiny.text is not None and (tiny.null_text is not None or "class_embed" in tiny.flow.blocks[0])
    return GuidedFlow(tiny.flow, shape, tiny.text, tiny.null_text, SamplingOptions(weight if can else 0.0))


def block_noise(tiny, key: int = 0) -> mx.array:
    return mx.random.normal(tiny.flow.tokens(tiny.x).shape, key=mx.random.key(key))


@pytest.mark.parametrize("window", [1, 2, 4, 99])
@pytest.mark.parametrize("tolerance", [0.3, 1e-3])
def test_every_token_is_within_the_tolerance(tiny, window, tolerance):
    flow = guided(tiny)
    z = block_noise(tiny)
    for index in flow.active():
        decoder = flow.decoder(index, *z.shape[:2])
        x = invert_block(decoder, z, RollingSettings(window, tolerance))
        mu, log_sigma = flow.predict(index, x)
        residual = mx.abs((x - mu) * mx.exp(-log_sigma) - z).max().item()
        assert residual <= tolerance + 2e-5
        tokens = decoder.length - decoder.first
        assert decoder.evaluations <= tokens
        if window == 1:
            assert decoder.evaluations == tokens


def test_windows_of_many_widths_are_traced_once(monkeypatch):
    traced, absolute = [], mx.abs
    monkeypatch.setattr(mx, "abs", lambda x: traced.append(x.shape) or absolute(x))
    tiny = tiny_case("softplus")
    z = tiny.flow(tiny.x, tiny.text).z
    for batch in (1, 2, 3):
        noise, text = (mx.concatenate([each[:1]] * batch) for each in (z, tiny.text))
        for window in range(2, 12):
            sample(tiny.flow, noise, text, method=RollingSettings(window, 1e-3))
    assert len(traced) <= 1


def test_a_loose_tolerance_saves_evaluations():
    tiny = tiny_case("softplus")
    z = tiny.flow(tiny.x, tiny.text).z
    counts = []
    for tolerance in (1e-6, 1e-2, 1.0):
        trace = SamplingTrace()
        sample(tiny.flow, z, tiny.text, method=RollingSettings(window=99, tolerance=tolerance), trace=trace)
        counts.append(sum(trace.evaluations))
    assert counts[0] > counts[1] > counts[2]


def test_independent_tokens_take_one_evaluation():
    """A flow whose blocks are the identity: the noise is the right guess."""
    tiny = tiny_case("softplus")
    for block in tiny.flow.blocks:
        block.proj_out.update({"weight": 0 * block.proj_out.weight, "bias": 0 * block.proj_out.bias})
    trace = SamplingTrace()
    x = sample(tiny.flow, tiny.x, tiny.text, method=RollingSettings(window=99), trace=trace)
    assert trace.evaluations == [1, 1, 1]
    assert mx.abs(x - tiny.x).max().item() < 1e-6


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_given_tokens_stay(tiny, settings):
    """With the first tokens given, the others come out as they do without."""
    flow = guided(tiny)
    z = block_noise(tiny)
    for index in flow.active():
        block, frames = flow.flow.blocks[index], flow.frames
        whole = invert_block(flow.decoder(index, *z.shape[:2]), z, SequentialSettings())
        own = block.permute(z, frames)
        for count in (1, 3, own.shape[1]):
            given = block.permute(whole, frames)[:, :count]
            noise = block.unpermute(own * mx.where(mx.arange(own.shape[1]) < count, 7.0, 1.0)[:, None], frames)
            x = invert_block(flow.decoder(index, *z.shape[:2]), noise, settings, given)
            assert mx.abs(x - whole).max().item() < 1e-4


def test_wild_guesses_do_no_harm():
    """Log-scales of exp flows run away where guesses are wrong, and must not reach the tokens before them as NaN."""
    tiny = tiny_case("exp_all_text")
    flow = guided(tiny, 0.0)
    z = block_noise(tiny)
    index = 0
    exact = invert_block(flow.decoder(index, *z.shape[:2]), z, SequentialSettings())
    for wild in (1e30, float("inf")):
        decoder = flow.decoder(index, *z.shape[:2])
        predict, calls = decoder.predict, []

        def explode(start, stop, predict=predict, calls=calls, wild=wild):
            mu, log_sigma = predict(start, stop)
            calls.append(stop - start)
            assert mx.isfinite(mu).all().item()
            if stop - start > 1:
                mu[:, 1:] += wild
            return mu, log_sigma

        decoder.predict = explode
        x = invert_block(decoder, z, RollingSettings(window=4, tolerance=1e-6))
        assert mx.abs(x - exact).max().item() < 1e-3 * mx.abs(exact).max().item()
        assert len(calls) == z.shape[1]


def test_a_batch_is_within_the_tolerance_of_single_samples():
    tiny = tiny_case("softplus")
    z = mx.random.normal(tiny.x.shape, key=mx.random.key(5))
    settings = RollingSettings(window=4, tolerance=1e-6)
    together = sample(tiny.flow, z, tiny.text, tiny.null_text, 1.0, settings)
    for index in range(2):
        one = slice(index, index + 1)
        alone = sample(tiny.flow, z[one], tiny.text[one], tiny.null_text, 1.0, settings)
        assert np.abs(np.array(alone - together[one])).max() < 1e-4


def test_values_are_built_before_it_is_known_how_many_are_done(tiny, monkeypatch):
    """Between the two a GPU has nothing to do."""
    flow, z, happened = guided(tiny), block_noise(tiny), []
    for kind, name in ((BlockDecoder, "predict"), (BlockDecoder, "write"), (NoiseFloor, "suspected")):
        whole = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, name=name, whole=whole: happened.append(name) or whole(*args))
    index = max(flow.active())
    invert_block(flow.decoder(index, *z.shape[:2]), z, RollingSettings(window=4))
    read = [number for number, name in enumerate(happened) if name == "suspected"]
    assert read and all(happened[number - 2 : number] == ["predict", "write"] for number in read)


class Written:
    """A decoder of which first guesses read tokens 0, 1, 4, 9, 16 and so on, of noise 1."""

    z = mx.ones((1, 40, 1))
    block = tiny_case("softplus").flow.blocks[0]

    def data(self, start, stop):
        return mx.square(mx.arange(start, stop, dtype=mx.float32))[None, :, None]


def guesses(guess, lag, start, stop, known=()):
    """Of tokens `start` to `stop`, after evaluations of (first token, numbers)."""
    found = FirstGuesses(Written(), RollingSettings(window=8, guess=guess, lag=lag))
    for first, count in known:
        numbers = mx.square(mx.arange(first, first + count, dtype=mx.float32))[None, :, None]
        found.learn(first, numbers, mx.zeros_like(numbers))
    return found.of(start, stop).flatten().tolist()


def test_first_guesses_from_the_frames_before():
    assert guesses("previous", 3, 2, 4) == [1, 1]  # there is no frame before
    assert guesses("previous", 3, 3, 8) == [0, 1, 4, 0, 1]
    assert guesses("motion", 3, 3, 5) == [0, 1]  # nor any motion yet
    # 9, 16, 25 were 0, 1, 4 before: so much again, and twice as much another frame on.
    assert guesses("motion", 3, 6, 11) == [18, 31, 46, 27, 46]


def test_first_guesses_from_what_the_frames_before_were_mapped_by():
    assert guesses("previous-affine", 3, 6, 8) == [9, 16]  # no evaluation yet: the data
    # mu is n squared, log sigma 0, and the noise 1.
    assert guesses("previous-affine", 3, 6, 8, [(0, 6)]) == [10, 17]
    assert guesses("motion-affine", 3, 6, 8, [(0, 6)]) == [19, 32]
    assert guesses("motion-affine", 3, 6, 8, [(3, 3)]) == [10, 17]  # one frame is known
    # What is older than two frames is forgotten, and what a wider window has seen is kept.
    assert guesses("motion-affine", 3, 18, 19, [(start, 8) for start in range(0, 11)]) == [2 * 225 - 144 + 1]
    assert guesses("motion-affine", 3, 8, 9, [(0, 8), (4, 1)]) == [2 * 25 - 4 + 1]


def test_what_is_remembered_of_frames():
    past = FramePast()
    past.remember([mx.array([[[1.0]], [[2.0]], [[10.0]], [[20.0]]])], 2, False)  # two samples, two frames each
    assert [value.flatten().tolist() for value in past.next(1, False)] == [[2, 20]]
    assert [value.flatten().tolist() for value in past.next(1, True)] == [[3, 30]]
    assert past.next(3, True)[0].flatten().tolist() == [2, 2, 2, 20, 20, 20]  # more frames at once are not moved
    past.remember([mx.array([[[5.0]], [[50.0]]])], 1, False)
    assert past.next(1, True)[0].flatten().tolist() == [8, 80]
    past.remember([mx.zeros((2, 1, 1)), mx.ones((2, 1, 1))], 1, True)  # something else
    assert [value.flatten().tolist() for value in past.next(1, True)] == [[0, 0], [1, 1]]


def test_first_guesses_stay_numbers():
    found = FirstGuesses(Written(), RollingSettings(guess="motion-affine", lag=1))
    for log_sigma, expected in ((20.0, 1e4), (100.0, 1.0)):  # twice that
        found.learn(0, mx.zeros((1, 2, 1)), mx.array([0.0, log_sigma])[None, :, None])
        assert found.of(2, 3).item() == expected


def test_a_steady_scene_is_guessed():
    """Where every frame is mapped alike, a window that is given the last one's map is right at once."""
    tiny = tiny_case("frames")
    deep = tiny.flow.blocks[-1]
    deep.proj_out.update({"weight": 0 * deep.proj_out.weight})  # the same mu and sigma everywhere
    z = mx.random.normal((1, 4, 2, 3, 2), key=mx.random.key(0))
    counts = {}
    for guess in ("noise", "previous", "previous-affine", "motion-affine"):
        trace = SamplingTrace()
        sample(tiny.flow, z, tiny.text[:1], method=RollingSettings(6, 1e-4, guess, 6), trace=trace)
        counts[guess] = trace.evaluations[0]
    # Two for the first frame, and one each for the others.
    assert counts["previous-affine"] == counts["motion-affine"] < counts["noise"] == counts["previous"]


@pytest.mark.parametrize("guess", ["previous", "motion", "previous-affine", "motion-affine"])
def test_blocks_of_single_frames_remember_the_last_ones(guess):
    """In a stream: they make the same frames, and a steady scene in as many evaluations as frames."""
    tiny = tiny_case("frames")
    z = mx.random.normal((2, 5, 2, 3, 2), key=mx.random.key(0))
    exact = sample(tiny.flow, z, tiny.text, tiny.null_text, 0.7)
    settings = RollingSettings(6, 1e-6, guess, 6)
    for count in (1, 2, 9):
        frames = sample_frames(tiny.flow, z, tiny.text, tiny.null_text, 0.7, settings, frames_at_once=count)
        assert mx.abs(mx.concatenate(list(frames), axis=1) - exact).max().item() < 1e-3
    for block in tiny.flow.blocks:
        block.proj_out.update({"weight": 0 * block.proj_out.weight})
    trace = SamplingTrace()
    list(sample_frames(tiny.flow, z, tiny.text, method=settings, trace=trace))
    first = trace.evaluations[1] - 4
    assert (1 < first <= 3) if guess.endswith("affine") else trace.evaluations[1] > 9
    # A scene that does not move at all.
    trace = SamplingTrace()
    still = mx.repeat(z[:, :1], 5, axis=1)
    list(sample_frames(tiny.flow, still, tiny.text, method=settings, trace=trace))
    assert trace.evaluations[1] - 4 == first if guess.endswith("affine") else trace.evaluations[1] <= 7


def test_a_window_is_advanced_alike_whatever_shapes_came_before():
    def values(batch: int, width: int, channels: int) -> list[mx.array]:
        old, noise, mu, log_sigma = mx.random.normal((4, batch, width, channels), key=mx.random.key(width))
        return [old, noise, mu, 0.1 * log_sigma]

    tolerance = mx.array(0.5)
    for shape in [(2, 6, 2), (1, 16, 64), (1, 1, 2), (2, 1, 1), (1, 4, 1), (2, 16, 64), (1, 2, 4)]:
        old, noise, mu, log_sigma = values(*shape)
        place = mx.arange(shape[1])[:, None]
        residual, new = mx.abs((old - mu) * mx.exp(-log_sigma) - noise), noise * mx.exp(log_sigma) + mu
        done = mx.cumprod((residual <= tolerance).all(axis=(0, 2)).astype(mx.int32)).sum()
        kept = mx.where(place < done, old, new)
        found = _advance(old, noise, mu, log_sigma, tolerance, place)
        for one, other in zip(found, (kept, done, residual.max(axis=(0, 2))), strict=True):
            assert one.shape == other.shape and np.allclose(one, other, atol=1e-5)
