"""Typicality: its statistics, and the file that keeps them."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import edit_weights

from mlx_starflow.likelihood import CalibrationStatistics, calibrate, score
from mlx_starflow.likelihood.calibration import STATISTICS_FILE, Statistics, describe
from mlx_starflow.pipelines import open_model


def test_statistics_tell_pictures_from_draws():
    rng = np.random.default_rng(0)
    values = 5 + 2 * rng.standard_normal((4000, 1, 2)) + 0.5 * rng.standard_normal((4000, 4, 2))
    statistics = Statistics.of(values)
    np.testing.assert_allclose(statistics.mean, 5, atol=0.15)
    np.testing.assert_allclose(statistics.between, 4, rtol=0.1)
    np.testing.assert_allclose(statistics.within, 0.25, rtol=0.1)
    np.testing.assert_allclose(statistics.std(1), np.sqrt(4.25), rtol=0.05)
    assert (statistics.std(1) > statistics.std(9)).all()
    assert Statistics.of(np.stack([np.array([0.0, 9.0]), np.array([9.0, 0.0])])).between == 0
    assert describe(Statistics(np.array(0.5), np.array(0.04), np.array(0.0))) == "0.5000 +- 0.2000"


def test_typicality_of_the_calibration_images(model):
    data = model.to_data(smooth_images(16))
    measured = calibrate(model, data, draws=2)
    assert measured.images == 16 and set(measured.nll) == {"unprompted"}
    deviations = [measured.typicality(each).deviation for each in score(model, smooth_images(16), draws=2)]
    assert abs(np.mean(deviations)) < 1e-6
    assert 0.5 < np.std(deviations) < 1.5
    typicality = measured.typicality(score(model, smooth_images(1), draws=2)[0])
    assert typicality.distance == abs(typicality.deviation)
    assert typicality.map.shape == (4, 4)


def test_captions_have_statistics_of_their_own(latent_flow):
    measured = calibrate(latent_flow, latent_flow.to_data(smooth_images(4)), ["a", "b", "c", "d"], draws=2)
    (each,) = score(latent_flow, smooth_images(1), "a", draws=2)
    assert measured.typicality(each, prompted=True).deviation != measured.typicality(each).deviation
    (wide,) = score(latent_flow, smooth_images(1), size=(16, 8), draws=2)
    assert measured.typicality(wide).map is None


@pytest.fixture
def copied(latent_flow, tmp_path):
    return open_model(shutil.copytree(latent_flow.directory, tmp_path / "model"))


def test_files(copied):
    assert CalibrationStatistics.find(copied.directory) is None
    measured = calibrate(copied, copied.to_data(smooth_images(3)), ["a", "b", "c"], draws=2)
    path = measured.save(copied.directory)
    assert path.name == STATISTICS_FILE
    found = CalibrationStatistics.find(copied.directory)
    assert found.images == 3 and found.fingerprint == measured.fingerprint
    for kind in ("prompted", "unprompted"):
        assert found.nll[kind].mean == measured.nll[kind].mean
        np.testing.assert_array_equal(found.tokens[kind].between, measured.tokens[kind].between)
    # Other weights: the statistics are no longer theirs.
    weight = mx.array(copied.flow.blocks[0].proj_out.weight)
    edit_weights(copied.directory, blocks__0__proj_out__weight=weight + 1)
    with pytest.warns(UserWarning, match="measured with other weights and is ignored; run `mlx-starflow calibrate`"):
        assert CalibrationStatistics.find(copied.directory) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: values | {"version": 2},
        lambda values: {key: value for key, value in values.items() if key != "tokens"},
        lambda values: values | {"nll": {"unprompted": {"mean": [1], "between": 2, "within": 3}}},
        lambda values: values | {"nll": {}, "tokens": {}},
        lambda values: values | {"nll": 3},
    ],
)
def test_damaged_files(copied, spoil):
    path = calibrate(copied, copied.to_data(smooth_images(2)), draws=2).save(copied.directory)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    assert "run `mlx-starflow calibrate` again" in message(CalibrationStatistics.find, copied.directory)


def test_mistakes(latent_flow, tmp_path):
    data = latent_flow.to_data(smooth_images(2))
    assert "2 pictures and 2 draws or more" in message(calibrate, latent_flow, data[:1])
    assert "2 pictures and 2 draws or more" in message(calibrate, latent_flow, data, draws=1)
    measured = calibrate(latent_flow, data, draws=2)
    assert "had no captions" in message(measured.typicality, score(latent_flow, smooth_images(1))[0], True)
    assert "cannot be written" in message(measured.save, tmp_path / "nowhere")


def test_the_embedded_model_has_one():
    from mlx_starflow.model_dir.hub import find_model

    measured = CalibrationStatistics.find(find_model("demo"))
    assert measured.images >= 100 and set(measured.nll) == {"prompted", "unprompted"}
    assert measured.nll["prompted"].mean < measured.nll["unprompted"].mean
