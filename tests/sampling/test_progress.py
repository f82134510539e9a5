"""How far a call is, and stopping it."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.metal import OWN, Metal
from helpers.tiny_flows import tiny_case

from mlx_starflow import Cancelled, StarflowError
from mlx_starflow.kernels.memory import bounded
from mlx_starflow.sampling import JacobiSettings, Progress, RollingSettings, certify, denoise, iterate, sample
from mlx_starflow.sampling.progress import watch

METHODS = ["sequential", JacobiSettings(block_size=3, threshold=0.0, max_iterations=3), RollingSettings(window=3)]


def noise(tiny):
    return tiny.flow(tiny.x, tiny.text).z


@pytest.mark.parametrize("method", METHODS, ids=["sequential", "jacobi", "rolling"])
def test_each_evaluation_is_told(tiny, method, evaluations):
    seen = []

    def look(progress: Progress) -> None:
        seen.append((len(evaluations), progress.phase, progress.block, progress.done, progress.total, progress.unit))

    plain = sample(tiny.flow, noise(tiny), tiny.text, method=method)
    evaluations.clear()
    x = sample(tiny.flow, noise(tiny), tiny.text, method=method, progress=Progress(look))
    assert mx.array_equal(x, plain)
    # Before the first, between any two, and after the last.
    assert {count for count, *_ in seen} == set(range(len(evaluations) + 1))
    assert {phase for _, phase, *_ in seen} == {"flow"}
    done = [done for _, _, _, done, _, _ in seen]
    assert done == sorted(done) and done[-1] == seen[-1][4] > 0
    blocks = [block for _, _, block, *_ in seen]
    assert blocks == sorted(blocks, reverse=True) and blocks[0] == len(tiny.flow.blocks) - 1


@pytest.mark.parametrize("method", METHODS, ids=["sequential", "jacobi", "rolling"])
def test_cancelling_takes_effect_before_the_next_evaluation(tiny, method, evaluations):
    calls = []

    def stop(progress: Progress) -> None:
        calls.append(None)
        if len(calls) == 4:
            calls.append(len(evaluations))
            progress.cancel()

    with pytest.raises(Cancelled):
        sample(tiny.flow, noise(tiny), tiny.text, method=method, progress=Progress(stop))
    assert len(evaluations) == calls[-1]
    assert issubclass(Cancelled, StarflowError)
    sample(tiny.flow, noise(tiny), tiny.text, method=method)


def test_from_another_thread_and_before_it_begins(tiny):
    cancelled = Progress()
    thread = threading.Thread(target=cancelled.cancel)
    thread.start()
    thread.join()
    assert cancelled.cancelled
    z = noise(tiny)
    for call in (
        lambda: sample(tiny.flow, z, tiny.text, progress=cancelled),
        lambda: certify(tiny.flow, tiny.x, z, tiny.text, progress=cancelled),
        lambda: denoise(tiny.flow, tiny.x, tiny.text, progress=cancelled),
    ):
        with pytest.raises(Cancelled):
            call()


def test_what_is_counted_is_nested():
    seen = []
    progress = Progress(lambda progress: seen.append((progress.phase, progress.done, progress.counted)))
    with progress.counting("batches", 2, "batch") as batches:
        with progress.running("flow"), progress.counting("flow", 8, "tok") as tokens:
            tokens.advance(3)
        batches.advance()
    assert [each[:2] for each in seen] == [("flow", 0), ("flow", 3), ("batches", 1)]
    assert seen[1][2] == (("batches", 0, 2, "batch"), ("flow", 3, 8, "tok"))
    assert progress.phase == "" and progress.block is None and progress.total is None and progress.unit == ""
    assert progress.preview() == [] and progress.seconds >= 0


def test_memory_is_bounded_while_anything_goes_on(monkeypatch):
    """And what is freed is given back at the end of each phase, or where nothing else goes on."""
    metal, progress = Metal(monkeypatch), Progress()
    with bounded():  # as in a server
        with progress.counting("batches", 2, "batch"):
            with progress.running("flow"):
                with progress.counting("flow", 8, "tok"):
                    assert metal.bounds
                assert not metal.given_back
            assert metal.given_back == 1 and metal.bounds
        assert metal.given_back == 2
    assert metal.limits == OWN
    for work in (progress.running("flow"), progress.counting("scoring", 1, "draw")):
        with pytest.raises(KeyError), work:
            assert metal.bounds
            raise KeyError
        assert metal.limits == OWN


def test_a_stream_that_is_left_is_no_longer_bounded(latent_flow, monkeypatch):
    metal = Metal(monkeypatch)
    first, second = (latent_flow.stream("a cat", images=2, seed=seed) for seed in (1, 2))
    next(first)
    next(second)
    first.close()
    assert metal.bounds
    second.close()
    assert metal.limits == OWN


def test_phases_that_interrupt_each_other():
    """As frames of a video do: what asks for frames waits while they are sampled, and goes on."""
    progress, seen = Progress(), []

    def frames():
        with progress.counting("flow", 2, "tok") as counter:
            for _ in range(2):
                counter.advance()
                yield

    waiting = frames()
    for _ in range(2):
        with progress.running("denoise"):
            with progress.running("flow"):
                next(waiting)
                seen.append((progress.phase, progress.done, progress.total))
            seen.append((progress.phase, progress.done, progress.total))
    assert seen == [("flow", 1, 2), ("denoise", 0, None), ("flow", 2, 2), ("denoise", 0, None)]


def test_bars(tiny, capsys):
    sample(tiny.flow, noise(tiny), tiny.text, progress=True)
    assert "sampling" in capsys.readouterr().err
    sample(tiny.flow, noise(tiny), tiny.text, progress=Progress())
    sample(tiny.flow, noise(tiny), tiny.text)
    assert capsys.readouterr().err == ""


def test_watch():
    given = Progress()
    assert watch(given) is given and watch(True).bar is True and watch(None).bar is None
    assert watch(False, print).callback is print
    assert "give Progress(callback) alone" in message(watch, given, print)
    assert np.isfinite(given.seconds)


def test_iterative_denoising_is_watched():
    case = tiny_case("itarflow")
    seen = []
    progress = Progress(lambda progress: seen.append((progress.phase, progress.counted)))
    levels = [0.3, 0.2, 0.1]
    plain = iterate(case.flow, case.x, case.text, levels)
    assert mx.array_equal(iterate(case.flow, case.x, case.text, levels, progress=progress), plain)
    assert max(counted[0].done for _, counted in seen if counted) == 3
    progress.cancel()
    with pytest.raises(Cancelled):
        iterate(case.flow, case.x, case.text, levels, progress=progress)
