"""The flow over text: what it is as a probability model, and its inversion in both directions, in patches, in gaps."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_text import CONFIG, text_flow, text_model

from mlx_starflow import StarflowError, load_text, sample
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.text_flow import TextFlow, TextFlowConfig
from mlx_starflow.sampling import JacobiSettings, RollingSettings, SamplingTrace, certify

KINDS = {
    "two directions": {},
    "patches": {"patch_size": 2},
    "affine": {"components": [0, 0]},
    "mixtures": {"components": [5, 4], "size": 2},
    "one number": {"size": 1},
    "ahead": {"ahead": 2},
    "ahead, patches": {"ahead": 2, "patch_size": 2, "components": [0, 5]},
}


def draws(flow: TextFlow, batch: int = 2, length: int = 12) -> tuple[mx.array, mx.array]:
    """Characters and noise."""
    rng = np.random.default_rng(1)
    characters = rng.integers(len(flow.config.alphabet), size=(batch, length)).astype(np.int32)
    noise = rng.standard_normal((batch, length, flow.config.size)).astype(np.float32)
    return mx.array(characters), mx.array(noise)


METHODS = ["sequential", JacobiSettings(threshold=0), RollingSettings(window=5, tolerance=1e-4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_sampling_inverts_the_flow(kind, method):
    flow = text_flow(**KINDS[kind])
    _, noise = draws(flow)
    trace = SamplingTrace()
    x = sample(flow, noise, method=method, trace=trace)
    assert x.shape == noise.shape
    assert certify(flow, x, noise).max < 2e-3
    assert np.abs(np.array(flow(x).z - noise)).max() < 2e-3
    tokens = 12 // flow.config.patch_size
    if method == "sequential":
        assert trace.evaluations == [tokens, tokens]


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_det_is_that_of_the_numerical_jacobian(kind):
    # Between narrow components the distribution function stands still, and differences say nothing.
    flow = text_flow(std=0.7, **KINDS[kind])
    x = flow.codebook.encode(*draws(flow, 1, 4))
    count, step, rows = x.size, 5e-3, []
    for index in range(count):
        move = mx.array(step * np.eye(count, dtype=np.float32)[index].reshape(x.shape))
        rows.append(np.array(flow(x + move).z - flow(x - move).z).reshape(-1).astype(np.float64) / (2 * step))
    assert abs(float(flow(x).log_det.sum()) - np.linalg.slogdet(np.array(rows))[1]) < 2e-2


def test_one_mixture_block_is_an_autoregressive_model_in_disguise():
    """Its weights are the probabilities of the next character, of which the ELBO is the likelihood."""
    flow = text_flow(layers_per_block=[2], components=[8])
    flow.codebook.log_std = mx.full(flow.codebook.log_std.shape, math.log(0.02))
    block = flow.blocks[0]
    # Means and widths of the components are the codebook's own: the network gives weights alone.
    count = block.config.components
    rows = mx.arange(block.proj_out.weight.shape[0])[:, None] < count
    block.proj_out.weight = mx.where(rows, block.proj_out.weight, 0)
    block.proj_out.bias = mx.where(rows[:, 0], block.proj_out.bias, 0)
    characters, noise = draws(flow, 3)
    z = flow.codebook.encode(characters, noise)
    condition = flow.conditions(z.shape, None).blocks[0]
    outputs = block.all_affine_parameters(z, condition, flow.rope_frequencies(z.shape, 0))
    log_weights, _, _ = block.config.mixture.parts(outputs)
    right = np.take_along_axis(np.array(log_weights[:, :, 0]), np.array(characters)[..., None], axis=-1)[..., 0]
    found = np.array(flow.log_weight(characters, noise))
    assert np.abs(found - right.sum(axis=1)).max() < 2e-3
    assert abs(right.sum(axis=1).mean() + 12 * math.log(8)) > 0.1  # it is not the uniform distribution


def test_probabilities_of_all_texts_add_up_to_one():
    flow = text_flow(alphabet="abc", length=4, layers_per_block=[1, 1], components=[3, 0], size=2)
    flow.codebook.log_std = mx.full((3,), math.log(0.05))
    flow.codebook.mean = mx.array([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]])
    texts = mx.array(np.stack(np.meshgrid(*[np.arange(3)] * 4, indexing="ij"), axis=-1).reshape(-1, 4).astype(np.int32))
    rng = np.random.default_rng(0)
    draws = [
        np.array(flow.log_weight(texts, mx.array(rng.standard_normal((81, 4, 2)).astype(np.float32))))
        for _ in range(200)
    ]
    # The importance-weighted estimate of each is unbiased.
    values = np.exp(np.array(draws, np.float64))
    total, error = values.mean(axis=0).sum(), values.std(axis=0).sum() / math.sqrt(200)
    assert abs(total - 1) < max(4 * error, 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_is_read_last_and_predicted_from_both_sides(kind):
    flow = text_flow(**KINDS[kind]).filling([4 <= place < 8 for place in range(12)])
    characters, noise = draws(flow)
    z = flow.codebook.encode(characters, noise)
    first = flow.log_priors(z).sum(axis=1)
    out = flow(z)
    moved = mx.array(z)
    moved[:, 5] = moved[:, 5] + 1.0
    # What is given makes the same noise whatever fills the gap.
    again = flow(moved)
    outside = np.array([*range(4), *range(8, 12)])
    assert np.abs(np.array(out.z - again.z))[:, outside].max() == 0
    assert np.abs(np.array(flow.log_priors(moved).sum(axis=1) - first)).min() > 0
    # And what fills the gap depends on both sides of it.
    for place in (0, 11):
        moved = mx.array(z)
        moved[:, place] = moved[:, place] + 1.0
        assert np.abs(np.array(flow(moved).z - out.z))[:, 4:8].max() > 1e-4
    x = sample(flow, out.z)
    assert np.abs(np.array(flow(x).z - out.z)).max() < 2e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [range(4, 8), [0, 1, 6, 7, 10, 11]])
def test_the_density_of_a_gap_is_that_of_the_dense_jacobian(kind, places):
    """Given the rest of a text, log p of what fills its gaps: from z of the gap alone, and from its numerical
    derivatives by what is in the gap."""
    flow = text_flow(std=0.7, **KINDS[kind]).filling([place in places for place in range(12)])
    x = flow.codebook.encode(*draws(flow, 1))
    inside, step, rows = np.array(list(places)), 5e-3, []
    for place in inside:
        for number in range(flow.config.size):
            move = np.zeros(x.shape, np.float32)
            move[0, place, number] = step
            moved = np.array(flow(x + mx.array(move)).z - flow(x - mx.array(move)).z)[0, inside]
            rows.append(moved.reshape(-1).astype(np.float64) / (2 * step))
    z = np.array(flow(x).z)[0, inside]
    dense = np.linalg.slogdet(np.array(rows))[1] - 0.5 * (z**2 + math.log(2 * math.pi)).sum()
    assert abs(float(flow.log_priors(x)[0, mx.array(inside)].sum()) - dense) < 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_own_order_is_one_as_others_are(kind):
    """Said as an order it is read as without one, so that trainings of both train the same."""
    flow = text_flow(**KINDS[kind])
    forward = mx.arange(12 // flow.config.patch_size)
    x = draws(flow)[1]
    said = flow.reading([forward[::-1] if block.config.flip else forward for block in flow.blocks])
    assert np.abs(np.array(said(x).z - flow(x).z)).max() < 1e-5


def test_a_gap_reads_its_neighbour_and_what_comes_after_it():
    """A character depends most on those beside it, and never on what the block read just before for another place."""
    flow = text_flow(layers_per_block=[2], components=[8], ahead=2).filling([3 <= place < 6 for place in range(12)])
    characters, noise = draws(flow)

    def change(place: int, predicted: int) -> float:
        moved = np.array(characters)
        moved[:, place] = (moved[:, place] + 3) % 8
        one, other = (flow.codebook.encode(mx.array(each), noise) for each in (characters, moved))
        return float(np.abs(np.array(flow(one).z - flow(other).z))[:, predicted].mean())

    assert change(11, 3) == 0  # predicts nothing
    assert change(2, 3) > max(change(place, 3) for place in (0, 1, 8, 9, 10))
    assert min(change(place, 5) for place in (4, 6)) > max(change(place, 5) for place in (0, 1, 8, 9, 10))


def test_models_without_a_look_ahead_are_as_they_were(tmp_path):
    """Files from before there was `ahead` say nothing of it, and have no weights for it."""
    folder = text_model(tmp_path / "model")
    assert "ahead" not in json.loads((folder / "config.json").read_text())
    flow = load_text(folder).flow
    assert flow.config.ahead == 0 and not any("ahead" in name or "distance" in name for name in parameters(flow))
    flow = flow.filling([place in (0, 4, 5) for place in range(12)])
    x = draws(flow)[1]
    assert np.abs(np.array(flow(sample(flow, x)).z - x)).max() < 2e-3


def test_temperature_sharpens_choices_and_stays_a_flow():
    flow = text_flow()
    _, noise = draws(flow, 8)
    cold = flow.at_temperature(0.1)
    x = sample(cold, noise)
    assert certify(cold, x, noise).max < 2e-3
    assert certify(flow, x, noise).max > 0.1
    with pytest.raises(StarflowError, match="temperature must be greater than 0, not 0"):
        flow.at_temperature(0)


def test_shorter_texts_and_wrong_ones():
    flow = text_flow(patch_size=2)
    assert flow(draws(flow, 1, 6)[1]).z.shape == (1, 6, 3)
    for shape in ((1, 14, 3), (1, 5, 3), (1, 6, 2), (6, 3)):
        with pytest.raises(StarflowError, match="this flow reads"):
            flow(mx.zeros(shape))
    with pytest.raises(StarflowError, match="no condition"):
        flow(mx.zeros((1, 6, 3)), mx.zeros((1,)))
    with pytest.raises(StarflowError, match="use guidance 0"):
        sample(flow, mx.zeros((1, 6, 3)), guidance=1.0)
    with pytest.raises(StarflowError, match="no character is hidden"):
        flow.filling([False] * 12)
    for hidden in ([False, True, True, False], [True, True, False]):
        with pytest.raises(StarflowError, match="multiples of 2"):
            flow.filling(hidden)


def test_characters():
    flow = text_flow()
    assert flow.text(flow.characters("bad cab")) == "bad cab"
    with pytest.raises(StarflowError, match="does not know the character 'z'"):
        flow.characters("azb")
    known = text_flow(alphabet="ab\ufffd")
    assert known.characters("azb").tolist() == [0, 2, 1]
    flow.codebook.log_std = mx.full((8,), -3.0)
    characters, noise = draws(flow)
    assert flow.codebook.decode(flow.codebook.encode(characters, noise)).tolist() == characters.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphabet": "aa"}, "each character once"),
        ({"alphabet": "a"}, "alphabet must have 2 to"),
        ({"length": 13, "patch_size": 2}, "no multiple of patch_size"),
        ({"channels": 33}, "no multiple of head_dim"),
        ({"layers_per_block": []}, "layers_per_block"),
        ({"components": [8]}, "components must hold 2 numbers"),
        ({"components": [8, -1]}, r"components\[1\] must be"),
        ({"components": [9999, 0]}, "of at most 4096"),
        ({"head_dim": 1, "channels": 4}, "must be even"),
        ({"ahead": -1}, "ahead must be an integer of at least 0"),
        ({"ahead": 65}, "ahead must be in 0..64"),
        ({"ahead": 1.5}, "ahead must be"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(StarflowError, match=message):
        TextFlowConfig.from_dict({**CONFIG, **changes})


def test_configs_come_back():
    config = TextFlowConfig.from_dict({**CONFIG, "components": [0, 3]})
    assert TextFlowConfig.from_dict(config.to_dict()) == config
