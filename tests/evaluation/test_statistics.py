"""Files of statistics: the field's layouts, there and back, and damaged ones."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message

from mlx_starflow.convert.pth import read_checkpoint
from mlx_starflow.evaluation.measures import Gaussian, frechet_distance
from mlx_starflow.evaluation.statistics import read_statistics, write_statistics

FEATURES = np.random.default_rng(0).standard_normal((40, 5))


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian.of(FEATURES)


@pytest.mark.parametrize("name", ["s.npz", "s.pth"])
def test_there_and_back(tmp_path, gaussian, name) -> None:
    write_statistics(gaussian, tmp_path / name)
    found = read_statistics(tmp_path / name)
    np.testing.assert_allclose(found.mean, gaussian.mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.covariance, gaussian.covariance, rtol=1e-10, atol=1e-12)
    assert found.count == 40
    assert frechet_distance(found, gaussian) < 1e-9


def test_as_others_write_them(tmp_path, gaussian) -> None:
    """pytorch-fid's file has no count, ADM's has pictures beside; columns may come first, and float32."""
    np.savez(tmp_path / "fid.npz", mu=gaussian.mean, sigma=np.asfortranarray(gaussian.covariance.astype(np.float32)))
    np.savez_compressed(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3)), mu=gaussian.mean, sigma=gaussian.covariance)
    for name in ("fid.npz", "adm.npz"):
        found = read_statistics(tmp_path / name)
        np.testing.assert_allclose(found.covariance, gaussian.covariance, rtol=1e-6)
        assert found.count == 0


def test_sums_as_torchmetrics_has_them(tmp_path, gaussian) -> None:
    write_statistics(gaussian, tmp_path / "s.pth")
    sums = read_checkpoint(tmp_path / "s.pth")
    np.testing.assert_allclose(sums["real_features_sum"], FEATURES.sum(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sums["real_features_cov_sum"], FEATURES.T @ FEATURES, rtol=1e-9, atol=1e-12)
    assert sums["real_features_num_samples"] == 40 and sums.dtype("real_features_num_samples") == "int64"
    assert not np.any(sums["fake_features_cov_sum"])


def test_sums_need_a_count(tmp_path, gaussian) -> None:
    unknown = Gaussian(gaussian.mean, gaussian.covariance)
    assert "nobody knows" in message(write_statistics, unknown, tmp_path / "s.pth")
    assert ".npz (mu, sigma) or .pth" in message(write_statistics, unknown, tmp_path / "s.txt")


@pytest.mark.parametrize("name", ["s.npz", "s.pth"])
def test_truncated(tmp_path, gaussian, name) -> None:
    path = tmp_path / name
    write_statistics(gaussian, path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        assert name in message(read_statistics, path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(3)}, "holds no mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "is damaged"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "is damaged"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 1.0], [0.0, 1.0]])}, "no covariance"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "no covariance"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "is damaged"),
        ({"mu": np.array([{}], object), "sigma": np.eye(1)}, "is damaged"),
        ({"mu": np.zeros((2, 2, 2)), "sigma": np.eye(2)}, "is damaged"),
    ],
)
def test_files_that_hold_something_else(tmp_path, arrays, said) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    assert said in message(read_statistics, tmp_path / "s.npz")


def test_files_that_are_not_there(tmp_path) -> None:
    assert "does not exist" in message(read_statistics, tmp_path / "s.npz")
    assert "not a regular file" in message(read_statistics, tmp_path)


def test_a_header_that_promises_too_much(tmp_path, gaussian) -> None:
    """Nothing is allocated that the file does not hold."""
    path = tmp_path / "s.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((9999, 1)))
    assert "is damaged" in message(read_statistics, path)
