"""Which of MLX's backends computes, and what the ones for GPUs lack."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

Backend = Literal["CPU", "Metal", "CUDA"]

CPU_ONLY = frozenset(
    """cholesky cholesky_inv eig eigh eigvals eigvalsh inv lu lu_factor pinv qr solve solve_triangular svd
    tri_inv""".split()
)
"""Functions of `mx.linalg` that neither Metal nor CUDA computes: they need `stream=mx.cpu`."""

CUDA_GAPS = {
    "the fused Metal kernels": "their plain versions run",
    "products with a quantized matrix whose columns are not whole groups and whole 64s": (
        "the matrix is made dense for the product, see model_dir.quantization.QuantizedLinear"
    ),
    "products of a quantized matrix with rows that are not contiguous": "the rows are copied first, there too",
    "sending and receiving between machines": "sums over NCCL, which are all that this package uses",
    "LU, QR, SVD, inverse, Cholesky, eigenvalues": "on the CPU; nothing in this package computes them",
}
"""What MLX 0.32's CUDA backend does not compute that its Metal backend, or its CPU, does -> what happens instead."""

CUDA_COLUMNS = 64


def backend() -> Backend:
    """The one that computes by default in this process."""
    if mx.default_device().type == mx.cpu:
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def multiplies_quantized(columns: int, group_size: int, where: Backend) -> bool:
    """Whether a backend multiplies any number of rows by a quantized matrix, `rows @ matrix.T`.

    On CUDA only products with a few rows have kernels for matrices whose columns are not multiples of 64 and of the
    size of a group.

    Args:
        columns: of the matrix, unpacked.
        group_size: numbers in a row that share a scale.
    """
    return where != "CUDA" or columns % max(CUDA_COLUMNS, group_size) == 0
