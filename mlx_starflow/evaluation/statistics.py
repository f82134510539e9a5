"""Files of feature statistics, as the field keeps them: NumPy's `mu, sigma`, and the sums of ml-tarflow."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import mlx.core as mx
import numpy as np

from mlx_starflow.convert.archive import write_archive
from mlx_starflow.convert.pth import read_checkpoint
from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.evaluation.measures import Gaussian
from mlx_starflow.media.files import exists, is_regular, replacing
from mlx_starflow.model_dir.files import Spec

SUFFIXES = (".npz", ".pth")

MOST_DIMENSIONS = 1 << 13
"""Of features: their covariance takes half a gigabyte."""

_SUM, _PRODUCTS, _COUNT = "features_sum", "features_cov_sum", "features_num_samples"


def read_statistics(path: Path) -> Gaussian:
    """Statistics of features in a file.

    Args:
        path: `.npz` with `mu` and `sigma`, as of pytorch-fid, TTUR and ADM; or `.pth` with `real_features_sum`,
            `real_features_cov_sum` and `real_features_num_samples`, as of torchmetrics and ml-tarflow.

    Raises:
        StarflowError: it is missing, damaged or none of these.
    """
    if not is_regular(path):
        what = "is not a regular file" if exists(path) else "does not exist"
        raise StarflowError(f"{path} {what}: give a file of statistics, .npz or .pth")
    found = _read_npz(path) if path.suffix == ".npz" else _read_sums(path)
    dimensions = found.mean.shape
    finite = np.isfinite(found.mean).all() and np.isfinite(found.covariance).all()
    if len(dimensions) != 1 or found.covariance.shape != dimensions * 2 or not finite:
        raise StarflowError(f"{path} is damaged: a mean [D] and a covariance [D, D] of finite numbers are needed")
    scale = np.abs(found.covariance).max(initial=0)
    symmetric = np.abs(found.covariance - found.covariance.T).max(initial=0) <= 1e-6 * scale
    if not symmetric or (np.diagonal(found.covariance) < -1e-6 * scale).any():
        raise StarflowError(f"{path} is damaged: what it holds is no covariance")
    return found


def write_statistics(gaussian: Gaussian, path: Path) -> None:
    """Write what `read_statistics` reads, by the name's suffix, `.npz` or `.pth`. Raises StarflowError."""
    check_statistics_name(path)
    if path.suffix == ".npz":
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=gaussian.mean, sigma=gaussian.covariance, count=np.array(gaussian.count))
        return
    count = gaussian.count
    if count < 2:
        raise StarflowError(f"{path}: sums need the number of pictures, which nobody knows here: write .npz instead")
    products = (count - 1) * gaussian.covariance + count * np.outer(gaussian.mean, gaussian.mean)
    real = {_SUM: count * gaussian.mean, _PRODUCTS: products, _COUNT: np.array(count)}
    arrays = {f"real_{name}": value for name, value in real.items()}
    arrays |= {f"fake_{name}": np.zeros_like(value) for name, value in real.items()}
    with mx.stream(mx.cpu):  # float64 exists there alone
        tensors = {
            name: mx.array(value, dtype=mx.int64 if value.ndim == 0 else mx.float64) for name, value in arrays.items()
        }
        write_archive(path, {name: Spec(each.shape, each.dtype) for name, each in tensors.items()}, tensors.items())


def check_statistics_name(path: Path) -> None:
    """Raise StarflowError unless the name says which kind of file to write."""
    if path.suffix not in SUFFIXES:
        raise StarflowError(f"{path}: statistics are written as .npz (mu, sigma) or .pth (ml-tarflow's sums)")


def _read_npz(path: Path) -> Gaussian:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not {"mu.npy", "sigma.npy"} <= set(names):
                raise StarflowError(f"{path} holds no mu and sigma: give a file of statistics, not of pictures")
            arrays = {}
            for name in ("mu.npy", "sigma.npy", "count.npy"):
                if name in names:
                    with archive.open(name) as file:
                        arrays[name] = _read_array(file, archive.getinfo(name).file_size)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        if isinstance(error, StarflowError):
            raise
        raise StarflowError(f"{path} is damaged, or no .npz: {one_line(error)}") from None
    count = arrays.get("count.npy")
    known = count is not None and count.size == 1 and np.isfinite(count).all()
    return Gaussian(arrays["mu.npy"], arrays["sigma.npy"], int(count.item()) if known and count is not None else 0)


def _read_array(file: IO[bytes], size: int) -> np.ndarray:
    """An array of real numbers in a file of NumPy's format of so many bytes, as float64. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    if dtype.kind not in "fiu" or len(shape) > 2 or any(side > MOST_DIMENSIONS for side in shape):
        raise ValueError(f"an array of {dtype} and shape {list(shape)[:4]}")
    content = file.read(math.prod(shape) * dtype.itemsize + 1)
    if len(content) != math.prod(shape) * dtype.itemsize or len(content) > size:
        raise ValueError("an array is cut short")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")
    return array.astype(np.float64)


def _read_sums(path: Path) -> Gaussian:
    checkpoint = read_checkpoint(path)
    names = [f"real_{name}" for name in (_SUM, _PRODUCTS, _COUNT)]
    if missing := [name for name in names if name not in checkpoint]:
        raise StarflowError(f"{path} holds no tensor {missing[0]}: give statistics as ml-tarflow writes them, or .npz")
    shapes = [checkpoint.shape(name) for name in names]
    good = len(shapes[0]) == 1 and shapes[1] == shapes[0] * 2 and math.prod(shapes[2]) == 1
    if not good or shapes[0][0] > MOST_DIMENSIONS or any(checkpoint.dtype(n) in ("bool", "bfloat16") for n in names):
        raise StarflowError(f"{path} is damaged: its sums have the shapes {[list(shape) for shape in shapes]}")
    total, products, number = (np.array(checkpoint[name], np.float64) for name in names)
    count = float(number.reshape(()))
    if not count >= 2 or not math.isfinite(count):
        raise StarflowError(f"{path} holds statistics of {count:g} pictures: a covariance needs 2 or more")
    mean = total / count
    return Gaussian(mean, (products - count * np.outer(mean, mean)) / (count - 1), int(count))
