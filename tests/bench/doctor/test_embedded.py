"""Each line about the embedded model fails when the model, its sampling or its memory is wrong."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from PIL import Image, ImageEnhance

from mlx_starflow import load
from mlx_starflow.bench.doctor import embedded
from mlx_starflow.editing.inversion import RoundTrip
from mlx_starflow.sampling import Certificate
from mlx_starflow.sampling.noise_floor import NoiseFloor

PRECISIONS = ["float32", "float16", "bfloat16"]


def check(name):
    return next(check for check in embedded.checks() if check.name == name)


@pytest.fixture(scope="module")
def good():
    """What float32 gives, sequentially and by a window."""
    return {method: embedded._sample(mx.float32, method) for method in ("sequential", "rolling")}


@pytest.fixture
def sampled(monkeypatch, good):
    """Samples of every precision, which a test may spoil: {(precision, method): sampled}."""
    kept = {(name, method): one for name in PRECISIONS for method, one in good.items()}
    monkeypatch.setattr(embedded, "_sample", lambda dtype, method: kept[str(dtype).rpartition(".")[2], method])
    return kept


LINES = [
    "image of a seed",
    "rolling window",
    "noise floor",
    "exact likelihood",
    *(f"certificate, {name}" for name in PRECISIONS),
]


def test_what_float32_gives_is_good(sampled):
    assert [check(name).run().verdict for name in LINES] == ["ok"] * len(LINES)


def test_it_says_nothing_of_the_plan(recwarn):
    """The embedded model's is for float32, and every line here names its method."""
    embedded._sample(mx.float16, "rolling")
    assert [str(warning.message) for warning in recwarn if "sampling_plan" in str(warning.message)] == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_image(sampled, precision):
    one = sampled[precision, "sequential"]
    sampled[precision, "sequential"] = replace(one, image=ImageEnhance.Brightness(one.image).enhance(0.97))
    assert check("image of a seed").run().failed


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("largest", [float("inf"), 1.0])
def test_a_wrong_certificate(sampled, precision, largest):
    sampled[precision, "sequential"] = replace(
        sampled[precision, "sequential"], certificate=Certificate(largest, largest / 2)
    )
    assert check(f"certificate, {precision}").run().failed


@pytest.mark.parametrize(("precision", "error"), [("float32", 2e-4), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_another_likelihood(sampled, precision, error):
    one = sampled[precision, "sequential"]
    sampled[precision, "sequential"] = replace(one, nll=one.nll + error)
    assert check("exact likelihood").run().failed


@pytest.mark.parametrize(
    "change", [{"evaluations": [16, 16, 16]}, {"certificate": Certificate(0.7, 0.1)}], ids=["slow", "far"]
)
def test_a_wrong_window(sampled, change):
    for name in PRECISIONS:
        sampled[name, "rolling"] = replace(sampled[name, "rolling"], **change)
    assert check("rolling window").run().failed


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        {"evaluations": [16, 16, 16]},
        {"certificate": Certificate(0.7, 0.1)},
        {"certificate": Certificate(1e-2, 1e-3, noise_floor=1e-3)},
        {"certificate": Certificate(0.02, 1e-3, noise_floor=0.3)},
        {"certificate": Certificate(float("nan"), 1e-3, noise_floor=1e-3)},
    ],
    ids=["slow", "far without a floor", "far beyond the floor", "a floor of hundreds of roundings", "no number"],
)
def test_a_wrong_noise_floor(sampled, precision, change):
    sampled[precision, "rolling"] = replace(sampled[precision, "rolling"], **change)
    assert check("noise floor").run().failed


def test_windows_that_do_not_know_the_noise_floor(monkeypatch, good):
    """One that measures it keeps the bounds, one that never does takes more evaluations than they allow."""

    def judged(one):
        with monkeypatch.context() as patched:
            patched.setattr(embedded, "_sample", lambda dtype, method: one if dtype == mx.bfloat16 else good[method])
            return check("noise floor").run()

    found = judged(embedded._sample(mx.bfloat16, "rolling"))
    assert found.verdict == "ok" and found.values["floor_bfloat16"] > 0
    monkeypatch.setattr(NoiseFloor, "suspected", lambda self, residuals, done: False)
    assert judged(embedded._sample(mx.bfloat16, "rolling")).failed


def test_a_model_that_computes_wrongly(monkeypatch):
    """One layer of one block gives a twentieth too much: a certificate does not see it, the recorded values do."""

    def wrong(*given, **options):
        pipe = load(*given, **options)
        layer = pipe.flow.blocks[0].attn_blocks[0].attention.proj
        scales = layer.scales if "scales" in layer else layer.weight
        layer.update({"scales": 1.05 * scales} if "scales" in layer else {"weight": 1.05 * scales})
        return pipe

    monkeypatch.setattr(embedded, "load", wrong)
    one = embedded._sample(mx.float32, "sequential")
    assert one.certificate.max < embedded.CERTIFICATE_BOUNDS["float32"]
    assert abs(one.nll - embedded.NLL) > embedded.NLL_BOUNDS["float32"]


def test_a_model_that_cannot_be_sampled(monkeypatch):
    def fail(*given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(embedded, "_sample", fail)
    for name in LINES:
        found = check(name).run()
        assert found.failed and "out of memory" in found.measured


def test_round_trips(monkeypatch):
    assert check("round trip").run().verdict == "ok"

    class Lossy:
        size = (64, 64)

        def encode(self, images, prompts):
            return None, RoundTrip(2e-3, 1e-4, 0.1)

    monkeypatch.setattr(embedded, "load", lambda name: Lossy())
    assert check("round trip").run().failed


def test_too_little_memory(monkeypatch):
    assert check("memory").run().verdict == "ok"
    monkeypatch.setattr(embedded, "available", lambda: 20 * 2**20)
    assert check("memory").run().failed


@pytest.mark.parametrize("phase", ["text", "flow", "verify", "denoise", "decode"])
def test_more_memory_than_planned(monkeypatch, phase):
    plan = embedded.plan

    def low(model):
        planned = plan(model)
        activations = {**planned.activations, phase: -sum(planned.weights.values()) + 2**20}
        return replace(planned, activations=activations)

    monkeypatch.setattr(embedded, "plan", low)
    found = check("memory plan").run()
    assert found.failed and f"{phase} " in found.measured


@pytest.mark.usefixtures("chosen_here")
def test_memory_as_planned():
    found = check("memory plan").run()
    assert found.verdict == "ok" and found.values.keys() == {"text", "flow", "verify", "denoise", "decode"}


def test_the_recorded_image_is_the_one_in_the_tests(good):
    white = Image.new("RGB", (64, 64), "white")
    assert abs(embedded.means(good["sequential"].image) - embedded.expected_means()).max() < 1
    assert abs(embedded.means(white) - embedded.expected_means()).max() > 50
