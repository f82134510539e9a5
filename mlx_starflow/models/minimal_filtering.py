"""3x3 convolutions in fewer products, for CPUs: Winograd's minimal filtering.

Along an axis, two neighbouring outputs of three taps take four products of combined inputs and combined taps instead of
six, so a cell of 2 x 2 outputs takes 16 matrix products instead of 36 (Winograd, "Arithmetic Complexity of
Computations", 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308). Where the
input is a smaller one whose rows and columns are doubled, one of the four combinations is zero, and 9 are left. The
combinations are sums of two or three numbers, so in float32 results are those of plain sums but for rounding. A GPU's
convolutions do the same inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

_CELLS = 512
"""Cells whose products are computed together: enough for a BLAS at its best, few enough to stay in a CPU's cache."""

_Combine = Callable[[mx.array, int], list[mx.array]]
_Taps = Callable[[mx.array], list[mx.array]]
_Outputs = Callable[[Sequence[mx.array]], tuple[mx.array, mx.array]]


def correlate_3x3(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Frames `[T, H, W, C]` with kernels `[O, t, 3, 3, C]`, nowhere padded: `[T - t + 1, H - 2, W - 2, O]`.

    It is computed at once, in float32, and has the dtype of `x`.
    """
    rows, columns = x.shape[1] - 2, x.shape[2] - 2
    odd = rows % 2, columns % 2
    if any(odd):
        x = mx.pad(x, [(0, 0), (0, odd[0]), (0, odd[1]), (0, 0)])
    return _in_cells(x, weight, bias, 2, _pairs, _pair_taps, _pair_outputs)[:, :rows, :columns]


def correlate_doubled(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """The same of frames whose rows and columns are doubled first, but for the outermost ones.

    `[T, H, W, C]` with kernels `[O, 1, 3, 3, C]` to `[T, 2 (H - 2), 2 (W - 2), O]`.
    """
    return _in_cells(x, weight, bias, 1, _neighbours, _doubled_taps, _doubled_outputs)


def _in_cells(
    x: mx.array, weight: mx.array, bias: mx.array, step: int, combine: _Combine, taps: _Taps, outputs: _Outputs
) -> mx.array:
    """Cells of 2 x 2 outputs, each from a window of the input that is `step` rows and columns after the one before."""
    frames, depth = x.shape[0] - weight.shape[1] + 1, weight.shape[1]
    down, across = (x.shape[1] - 2) // step, (x.shape[2] - 2) // step
    products = _combined_taps(weight, taps)
    bias = bias.astype(mx.float32)
    count = -(-_CELLS // (frames * across))
    parts = []
    for top in range(0, down, count):
        rows = min(count, down - top)
        window = x[:, step * top : step * (top + rows - 1) + (4 if step == 2 else 3)].astype(mx.float32)
        combined = [combine(part, 2) for part in combine(window, 1)]
        sums = []
        for i, line in enumerate(combined):
            for j, part in enumerate(line):
                # The second combination is in all four outputs with a factor of 1, and brings the bias.
                y = bias if i == j == 1 else None
                for k in range(depth):
                    flat = part[k : k + frames].reshape(-1, part.shape[-1])
                    y = flat @ products[i][j][k] if y is None else mx.addmm(y, flat, products[i][j][k])
                assert y is not None
                sums.append(y.reshape(frames, rows, across, -1))
        width = len(combined)
        columns = [outputs(sums[i * width : (i + 1) * width]) for i in range(width)]
        left, right = (outputs([column[side] for column in columns]) for side in range(2))
        y = mx.stack([mx.stack([left[row], right[row]], axis=3) for row in range(2)], axis=2)
        parts.append(y.reshape(frames, 2 * rows, 2 * across, -1).astype(x.dtype))
        mx.eval(parts[-1])
        del combined, sums, columns, left, right, window, y
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _combined_taps(weight: mx.array, taps: _Taps) -> list[list[list[mx.array]]]:
    """Kernels `[O, t, 3, 3, C]` to matrices `[C, O]`: by row, column and frame."""
    products = []
    for line in taps(weight.transpose(2, 3, 1, 0, 4).astype(mx.float32)):
        # Contiguous: a product copies matrices that are not, each time.
        products.append([mx.contiguous(each) for each in taps(line)])
        mx.eval(products[-1])
    return [[[each[k].T for k in range(each.shape[0])] for each in line] for line in products]


# ---- an axis of four inputs, two apart from cell to cell


def _pairs(x: mx.array, axis: int) -> list[mx.array]:
    cells = (x.shape[axis] - 2) // 2
    a, b, c, d = (_every(x, axis, start, cells, 2) for start in range(4))
    return [a - c, b + c, c - b, b - d]


def _pair_taps(weight: mx.array) -> list[mx.array]:
    outer, middle = 0.5 * (weight[0] + weight[2]), 0.5 * weight[1]
    return [weight[0], outer + middle, outer - middle, weight[2]]


def _pair_outputs(sums: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    a, b, c, d = sums
    return a + b + c, b - c - d


# ---- an axis of three inputs that stand for the four a, b, b, c


def _neighbours(x: mx.array, axis: int) -> list[mx.array]:
    a, b, c = (_every(x, axis, start, x.shape[axis] - 2, 1) for start in range(3))
    return [a - b, b, b - c]


def _doubled_taps(weight: mx.array) -> list[mx.array]:
    return [weight[0], weight[0] + weight[1] + weight[2], weight[2]]


def _doubled_outputs(sums: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    a, b, c = sums
    return a + b, b - c


def _every(x: mx.array, axis: int, start: int, count: int, step: int) -> mx.array:
    """So many of an axis, `step` apart."""
    places = [slice(None)] * x.ndim
    places[axis] = slice(start, start + step * (count - 1) + 1, step)
    return x[tuple(places)]
