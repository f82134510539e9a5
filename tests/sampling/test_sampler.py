"""Noise -> data against the official code (tests/data), against the forward pass, and wrong arguments."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from helpers.golden import EXACT, ITARFLOW, STARFLOW, TARFLOW
from helpers.paths import DATA
from helpers.tiny_flows import tiny_case
from mlx.utils import tree_map

from mlx_starflow.errors import StarflowError
from mlx_starflow.sampling import JacobiSettings, RollingSettings, SamplingTrace, certify, guided, sample
from mlx_starflow.sampling.guidance import Guidance

INVERSES = ["sequential", JacobiSettings(3, threshold=1e-13), *(RollingSettings(n, tolerance=1e-6) for n in (1, 3, 99))]

ARRAYS = [
    (path.parent.name, match[1] or "", match[2])
    for path in sorted(DATA.glob("*/golden.safetensors"))
    if path.parent.name.startswith(("t2i", "pretrained_lm", "tarflow", "itarflow"))
    for name in sorted(mx.load(str(path)))
    if (match := re.fullmatch(r"(\d+x\d+\.)?((?:reverse|jacobi).*)", name))
]


def invert(golden, case: str, prefix: str, kind: str, **changes) -> mx.array:
    noise = golden[prefix + ("z" if kind == "reverse_of_z" else "noise")]
    if case.startswith("tarflow"):
        return sample(golden.flow, noise, golden.get("y"), **TARFLOW[kind], **changes)
    if case.startswith("itarflow"):
        return sample(golden.flow, noise, golden.get("y"), noise_level=0.3, **ITARFLOW[kind], **changes)
    settings = dict(STARFLOW[kind])
    if case == "pretrained_lm":
        settings["guidance"] = 2.0
    null = golden[prefix + "y_null"] if "guidance" in settings else None
    return sample(golden.flow, noise, golden[prefix + "y"], null, **settings, **changes)


def test_every_array_is_here():
    assert {kind for case, _, kind in ARRAYS if case == "t2i"} == set(STARFLOW)
    assert {kind for case, _, kind in ARRAYS if case == "tarflow"} == set(TARFLOW)
    assert {kind for case, _, kind in ARRAYS if case == "itarflow"} == set(ITARFLOW)
    assert len(ARRAYS) == 68


@pytest.mark.parametrize(("case", "prefix", "kind"), ARRAYS)
def test_sampling_is_the_official_one(golden, case, prefix, kind):
    """Every picture of every array, but of `*_starflow` the first alone: the next test compares the others."""
    golden = golden(case)
    x = invert(golden, case, prefix, kind)
    if kind.endswith("_starflow"):  # see ITARFLOW
        assert np.abs(np.array(x)[0] - golden.arrays[kind][0]).max() < 2e-4
        return
    assert golden.error(x, prefix + kind) < 2e-4
    if kind == "reverse_of_z":
        assert golden.error(x, prefix + "x") < 2e-4


def of_the_release(
    mu: mx.array, log_sigma: mx.array, mu_null: mx.array, log_null: mx.array, weight: float | mx.array
) -> tuple[mx.array, mx.array]:
    """STARFlow's guidance as the release's code has it for an iTARFlow: the first sample's scales for all means."""
    s = mx.minimum(mx.exp(log_sigma - log_null), 1) ** 2
    guided = ((1 + weight) * mu - weight * s[:1] * mu_null) / (1 + weight - weight * s[:1])
    return guided, log_sigma - 0.5 * mx.log(1 + weight - weight * s)


@pytest.mark.parametrize("case", ["itarflow", "itarflow_shared"])
def test_the_releases_own_rule_gives_all_of_its_pictures(golden, case, monkeypatch):
    """All four pictures of `*_starflow`, by the rule that the release recorded them with.

    A picture by itself is the same by that rule and by ours, and then like any other of ours: each is sampled alone
    by our rule and compared with the batch that our rule makes.
    """
    golden, kind = golden(case), "reverse_t0.3_cfg1.5_annealed_starflow"
    labels, noise = golden["y"], golden["noise"]
    ours = np.array(invert(golden, case, "", kind))
    for index in range(4):
        one = slice(index, index + 1)
        alone = sample(golden.flow, noise[one], labels[one], noise_level=0.3, **ITARFLOW[kind])
        assert np.abs(np.array(alone)[0] - ours[index]).max() < 1e-5

    def rule(mode: str, *options) -> Guidance:
        assert mode == "starflow"
        return Guidance(of_the_release, *options)

    monkeypatch.setattr(guided, "Guidance", rule)
    assert golden.error(invert(golden, case, "", kind), kind) < 2e-5
    for index in range(4):
        one = slice(index, index + 1)
        alone = sample(golden.flow, noise[one], labels[one], noise_level=0.3, **ITARFLOW[kind])
        assert np.abs(np.array(alone)[0] - ours[index]).max() < 1e-5


def test_float64_weights(golden):
    with mx.stream(mx.cpu):
        golden = golden("t2i_modern", mx.float64)
        assert golden.error(invert(golden, "t2i_modern", "", "reverse_cfg"), "reverse_cfg") < 2e-5


@pytest.mark.parametrize("kind", [kind for case, _, kind in ARRAYS if case == "tarflow"])
def test_jacobi_agrees_for_tarflow(golden, kind):
    golden = golden("tarflow")
    settings = JacobiSettings(block_size=5, threshold=1e-12)
    x = invert(golden, "tarflow", "", kind, method=settings)
    assert golden.error(x, kind) < 2e-4


@pytest.mark.parametrize("case", ["itarflow_patches", "itarflow_shared"])
def test_windows_agree_for_blocks_with_patches_and_shared_layers(golden, case):
    golden = golden(case)
    for method in (JacobiSettings(5, threshold=1e-12), RollingSettings(7, tolerance=1e-6)):
        assert golden.error(invert(golden, case, "", "reverse_t0.3", method=method), "reverse_t0.3") < 2e-4


def test_guided_blocks_and_modes():
    tiny = tiny_case("itarflow")
    z = tiny.noise(tiny.flow(tiny.x, tiny.text).z)

    def states(**options) -> list[np.ndarray]:
        trace = SamplingTrace(keep_states=True)
        sample(tiny.flow, z, mx.array([2, 1]), guidance=0.7, trace=trace, **options)
        return [np.array(state) for state in trace.states]

    every, first, third = states(), states(guided_blocks=1), states(guided_blocks=3)
    plain = SamplingTrace(keep_states=True)
    sample(tiny.flow, z, mx.array([2, 1]), trace=plain)
    assert np.array_equal(first[0], every[0]) and np.abs(first[1] - every[1]).max() > 1e-4
    assert np.abs(first[0] - np.array(plain.states[0])).max() > 1e-4
    assert all(np.array_equal(a, b) for a, b in zip(every, third, strict=True))
    for mode in ("starflow", "tarflow"):
        assert np.abs(states(guidance_mode=mode)[0] - every[0]).max() > 1e-5
    assert np.array_equal(states(guidance_mode="itarflow")[-1], every[-1])
    # Together with the certificate, which knows the same options.
    options = {"guidance": 0.7, "guided_blocks": 2, "guidance_mode": "starflow", "noise_level": 0.2}
    x = sample(tiny.flow, z, mx.array([2, 1]), **options)
    assert certify(tiny.flow, x, z, mx.array([2, 1]), **options).max < 1e-3
    assert certify(tiny.flow, x, z, mx.array([2, 1]), **{**options, "noise_level": 0.4}).max > 0.01


def test_jacobi_agrees_for_shifted_tokens(golden):
    golden = golden("t2i_shifted")
    args = (golden.flow, golden["noise"], golden["y"], golden["y_null"], 2.5, EXACT)
    assert golden.error(sample(*args), "reverse_cfg") < 2e-4


# Errors add up over the tokens; these are off by 0.052, 0.022 and 0.016.
@pytest.mark.parametrize(("case", "bound"), [("t2i", 0.1), ("t2i_all_text", 0.05), ("tarflow", 0.04)])
def test_bfloat16_weights(golden, case, bound):
    golden = golden(case, mx.bfloat16)
    x = invert(golden, case, "", "reverse")
    assert x.dtype == mx.float32
    assert golden.error(x, "reverse") < bound


@pytest.mark.parametrize("method", INVERSES, ids=str)
def test_sampling_inverts_the_flow(tiny, method):
    flow = tiny.flow
    z = tiny.noise(flow(tiny.x, tiny.text).z)
    x = sample(flow, z, tiny.text, method=method)
    assert x.shape == tiny.x.shape and x.dtype == mx.float32
    assert np.abs(np.array(x - tiny.x)).max() < 2e-4
    # And the other way round.
    noise = mx.random.normal(z.shape, key=mx.random.key(3))
    back = tiny.noise(flow(sample(flow, noise, tiny.text, method=method), tiny.text).z)
    assert np.abs(np.array(back - noise)).max() < 2e-4


def test_samples_do_not_depend_on_each_other(tiny):
    noise = tiny.noise(tiny.flow(tiny.x, tiny.text).z) + 0.5
    settings = {"guidance": 1.0} if tiny.text is not None else {}
    both = sample(tiny.flow, noise, tiny.text, tiny.null_text, **settings)
    for index in range(2):
        text = None if tiny.text is None else tiny.text[index : index + 1]
        one = sample(tiny.flow, noise[index : index + 1], text, tiny.null_text, **settings)
        assert np.abs(np.array(one[0] - both[index])).max() < 1e-4


@pytest.mark.parametrize("family", ["softplus", "exp_all_text", "shifted", "patches", "language_model", "tarflow"])
def test_guidance_moves_samples_and_vanishes_at_weight_zero(family):
    tiny = tiny_case(family)
    # A dropped label is its own null: guidance has nothing to move it away from.
    text = mx.array([2, 0]) if tiny.text.ndim == 1 else tiny.text
    noise = mx.random.normal(tiny.flow(tiny.x, text).z.shape, key=mx.random.key(3))
    plain = sample(tiny.flow, noise, text)
    tiniest = sample(tiny.flow, noise, text, tiny.null_text, guidance=1e-7)
    guided = sample(tiny.flow, noise, text, tiny.null_text, guidance=2.0)
    annealed = sample(tiny.flow, noise, text, tiny.null_text, guidance=2.0, annealed_guidance=True)
    assert np.abs(np.array(tiniest - plain)).max() < 1e-4
    for sample_index in range(2):
        assert np.abs(np.array(guided - plain))[sample_index].max() > 1e-3
    assert np.abs(np.array(annealed - guided)).max() > 1e-3


def test_one_null_text_serves_all_samples():
    tiny = tiny_case("softplus")
    noise = mx.random.normal(tiny.x.shape, key=mx.random.key(3))
    one = sample(tiny.flow, noise, tiny.text, tiny.null_text, 2.0)
    each = sample(tiny.flow, noise, tiny.text, mx.repeat(tiny.null_text, 2, axis=0), 2.0)
    assert np.array_equal(np.array(one), np.array(each))


def test_tarflow_conditions():
    tiny = tiny_case("tarflow")
    flow, labels = tiny.flow, mx.array([0, 1])
    noise = mx.random.normal((2, 4, 4), key=mx.random.key(3))
    x = sample(flow, noise, labels, guidance=1.0)
    dropped = sample(flow, noise, mx.array([0, -1]), guidance=1.0)
    assert np.abs(np.array(x - dropped)[0]).max() < 1e-6
    assert np.abs(np.array(dropped - sample(flow, noise))[1]).max() < 1e-5
    # Any class can be what guidance moves away from.
    away = sample(flow, noise, labels, mx.array([1]), 1.0)
    assert np.abs(np.array(away - sample(flow, noise, labels))[1]).max() < 1e-5
    assert np.abs(np.array(away - x)[0]).max() > 1e-4
    # Labels of any whole type do.
    assert np.array_equal(np.array(sample(flow, noise, labels.astype(mx.uint8), guidance=1.0)), np.array(x))
    # The temperature is the null prediction's: without guidance it has no effect.
    hot = sample(flow, noise, labels, attn_temp=0.5)
    assert np.array_equal(np.array(hot), np.array(sample(flow, noise, labels)))
    assert np.abs(np.array(sample(flow, noise, labels, guidance=1.0, attn_temp=0.5) - x)).max() > 1e-5


def test_trace(capsys):
    tiny = tiny_case("identity_block")
    out = tiny.flow(tiny.x, tiny.text)
    trace = SamplingTrace(keep_states=True)
    sample(tiny.flow, out.z, tiny.text, trace=trace, progress=True)
    assert "sampling" in capsys.readouterr().err
    assert trace.evaluations == [6, 0, 6]
    assert len(trace.states) == 3
    for state, hidden in zip(trace.states, reversed(out.hidden[:-1]), strict=True):
        assert np.abs(np.array(state - hidden)).max() < 1e-4
    trace = SamplingTrace()
    sample(tiny.flow, out.z, tiny.text, method="jacobi", trace=trace)
    assert trace.states == [] and trace.evaluations[1] == 0 and min(trace.evaluations[::2]) > 1
    assert capsys.readouterr().err == ""
    shifted = tiny_case("shifted")
    trace = SamplingTrace()
    sample(shifted.flow, shifted.x, shifted.text, trace=trace)
    assert trace.evaluations == [5, 5, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": -1.0}, "guidance must be 0 or more, not -1"),
        ({"guidance": float("nan")}, "guidance must be 0 or more"),
        ({"method": "parallel"}, "unknown sampling method 'parallel'; it must be one of sequential, jacobi, rolling"),
        ({"attn_temp": 0.0}, "temperature must be greater than 0"),
        ({"guidance": 1.0, "null_text": None}, "guidance needs text and null_text"),
        ({"guidance": 1.0, "text": None}, "guidance needs text and null_text"),
        ({"guidance": 1.0, "null_text": mx.zeros((1, 4, 6))}, r"null_text has shape \(1, 4, 6\)"),
        ({"guidance": 1.0, "null_text": mx.zeros((3, 3, 6))}, r"null_text has shape \(3, 3, 6\)"),
        ({"text": None}, "reads text"),
        ({"text": mx.zeros((1, 3, 6))}, "1 texts for 2 samples"),
        ({"text": mx.zeros((2, 3, 5))}, "5 wide; this flow reads 6"),
        ({"text": mx.zeros((2, 6))}, r"embeddings \[batch, length, width\]"),
        ({"z": mx.zeros((2, 2, 3, 4))}, r"shape \(2, 2, 3, 4\); this flow reads \[batch, height, width, 2\]"),
        ({"z": mx.zeros((2, 6, 2))}, "shape"),
        ({"guidance_target": "b", "guidance": 1.0}, "TarFlow"),
        ({"guidance_target": "c"}, "guidance_target must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    tiny = tiny_case("softplus")
    with pytest.raises(StarflowError, match=message):
        sample(tiny.flow, **{"z": tiny.x, "text": tiny.text, "null_text": tiny.null_text, **arguments})


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("no_text", {"guidance": 1.0}, "reads no text, so guidance has no effect"),
        ("tarflow_vp", {"guidance": 1.0}, "no classes, so guidance has no effect"),
        ("tarflow_vp", {"text": mx.array([0, 1])}, "no classes"),
        ("tarflow", {"guidance": 1.0}, "guidance needs a class label"),
        ("tarflow", {"text": mx.array([0, 3])}, "labels must be 0 to 2, or -1"),
        ("tarflow", {"text": mx.array([0, -2])}, "labels must be 0 to 2, or -1"),
        ("tarflow", {"text": mx.array([0])}, "2 whole numbers"),
        ("tarflow", {"text": mx.array([0, 1]), "guidance": 1.0, "null_text": mx.array([5])}, "labels must be 0 to 2"),
        ("tarflow", {"z": mx.zeros((2, 4, 4, 1))}, r"this flow reads tokens \[batch, 4, 4\]"),
    ],
)
def test_wrong_arguments_of_other_flows_are_named(family, arguments, message):
    tiny = tiny_case(family)
    z = tiny.flow(tiny.x).z
    with pytest.raises(StarflowError, match=message):
        sample(tiny.flow, **{"z": z, **arguments})


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
def test_no_nan_is_returned(tiny, method):
    z = tiny.flow(tiny.x, tiny.text).z
    tiny.flow.update(tree_map(lambda w: w * float("nan"), tiny.flow.parameters()))
    with pytest.raises(StarflowError, match="not finite"):
        sample(tiny.flow, z, tiny.text, method=method)


def test_infinite_noise_is_refused():
    tiny = tiny_case("softplus")
    z = np.array(tiny.x)
    z[0, 0, 0, 0] = np.inf
    with pytest.raises(StarflowError, match="not finite"):
        sample(tiny.flow, mx.array(z), tiny.text)
