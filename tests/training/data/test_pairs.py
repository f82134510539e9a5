"""Pairs of a flow: they are exact, and on disk they are a teacher's and no other's."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.errors import StarflowError
from mlx_starflow.sampling import GuidedFlow, SamplingOptions, denoise
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.pairs.batches import PairData
from mlx_starflow.training.data.pairs.compute import Pairs, pairs_of_data, pairs_of_samples
from mlx_starflow.training.data.pairs.files import SHARD, PairFolder

CONDITIONED = ["softplus", "shifted", "patches", "identity_block", "tarflow"]
FAMILIES = [*CONDITIONED, "no_text", "tarflow_vp"]


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_data_lead_from_noise_to_data_block_by_block(family):
    tiny = tiny_case(family)
    noise = mx.random.normal(tiny.x.shape, key=mx.random.key(1))
    pairs = pairs_of_data(tiny.flow, tiny.x, noise, tiny.text)
    noisy = tiny.flow.tokens(tiny.x + tiny.flow.noise_std * noise)
    assert np.allclose(pairs.states[:, -1], noisy, atol=1e-6)
    assert np.allclose(pairs.clean, tiny.flow.tokens(tiny.x))
    _check_states(tiny, pairs, 0.0)


@pytest.mark.parametrize(
    ("family", "guidance"), [*((family, 0.0) for family in FAMILIES), *((family, 0.8) for family in CONDITIONED)]
)
def test_pairs_of_samples(family, guidance):
    tiny = tiny_case(family)
    z = mx.random.normal(tiny.noise(tiny.flow(tiny.x, tiny.text).z).shape, key=mx.random.key(2))
    pairs = pairs_of_samples(tiny.flow, z, tiny.text, tiny.null_text, SamplingOptions(guidance))
    assert np.allclose(pairs.noise, tiny.flow.output_tokens(z))
    x = tiny.flow.latents(mx.array(pairs.states[:, -1]), tiny.x.shape)
    assert np.allclose(pairs.clean, tiny.flow.tokens(denoise(tiny.flow, x, tiny.text)), atol=1e-5)
    _check_states(tiny, pairs, guidance)


def _check_states(tiny, pairs: Pairs, guidance: float) -> None:
    """Each block, run forwards over its state, gives the one before, and the first of them the noise."""
    z = tiny.flow.token_noise(mx.array(pairs.noise), tiny.x.shape)
    guided = GuidedFlow(tiny.flow, z.shape, tiny.text, tiny.null_text, SamplingOptions(guidance))
    read = [np.array(tiny.flow.noise_tokens(z)), *pairs.states.swapaxes(0, 1)]
    assert len(read) == 1 + len(list(guided.active()))
    for index, before, after in zip(guided.active(), read[:-1], read[1:], strict=True):
        mu, log_sigma = guided.predict(index, mx.array(after))
        assert np.allclose((after - mu) * mx.exp(-log_sigma), before, atol=2e-4)


def shard(start: float = 0.0) -> Pairs:
    rows = np.arange(SHARD, dtype=np.float32).reshape(-1, 1, 1) + start
    return Pairs(rows, np.stack([rows + 0.25, rows + 0.5], axis=1), rows + 0.75, np.arange(SHARD))


def folder(path, **identity) -> PairFolder:
    return PairFolder(path / "pairs", {"teacher": "a", **identity}, (1, 1))


def test_pairs_on_disk(tmp_path):
    made = folder(tmp_path)
    made.write(0, shard())
    made.write(1, shard(SHARD))
    found = folder(tmp_path)
    assert found.has(0) and found.has(1) and not found.has(2) and found.numbers() == [0, 1]
    rows = found.read(np.array([3, SHARD + 1, 0]))
    assert rows["noise"].ravel().tolist() == [3, SHARD + 1, 0] and rows["noise"].dtype == np.float32
    assert rows["states"].shape == (3, 2, 1, 1) and rows["states"][0].ravel().tolist() == [3.25, 3.5]
    assert rows["clean"].ravel().tolist() == [3.75, SHARD + 1.75, 0.75]
    assert rows["condition"].tolist() == [3, 1, 0] and rows["condition"].dtype == np.int32


def test_half_of_a_shard_counts_for_nothing(tmp_path):
    made = folder(tmp_path)
    made.write(0, shard())
    path = tmp_path / "pairs/pairs-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert not made.has(0)
    with pytest.raises(StarflowError, match="is damaged"):
        made.read(np.array([0]))


def test_other_pairs_are_refused(tmp_path):
    folder(tmp_path).write(0, shard())
    with pytest.raises(StarflowError, match=r"pairs of another kind \(teacher a -> b\)"):
        folder(tmp_path, teacher="b")
    assert not PairFolder(tmp_path / "pairs", {"teacher": "b"}, (1, 1), resume=False).has(0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("dear")
    with pytest.raises(StarflowError, match="holds other files"):
        PairFolder(tmp_path / "other", {}, (1, 1))


def test_numbers_that_are_too_large_are_refused(tmp_path):
    with pytest.raises(StarflowError, match="clean are not finite"):
        folder(tmp_path).write(0, replace(shard(), clean=np.full((SHARD, 1, 1), 1e6, np.float32)))


def test_batches(tmp_path):
    made = folder(tmp_path)
    made.write(0, shard())
    config, rng, subset = TrainingConfig(steps=1, batch_size=4), np.random.default_rng(0), np.arange(10, 20)
    inverse = [PairData(made, subset).batch(rng, config, 0.0) for _ in range(40)]
    assert 10 < sum("refined" in batch for batch in inverse) < 30
    assert all(batch["noise"].min() >= 10 and batch["noise"].max() < 20 for batch in inverse)
    matching = PairData(made, subset, matching=True).batch(rng, config, 0.0)
    assert "states" not in matching and ((matching["time"] >= 0) & (matching["time"] < 1)).all()
    fresh = PairData(made, subset, matching=True, independent=0.5).batch(rng, config, 0.0)
    assert abs(fresh["noise"]).max() < 5 and (fresh["clean"] > 10).all()
