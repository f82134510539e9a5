"""PyTorch reference of `models/rope.py`: positions as rows of unit complex numbers, one a rotary pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

THIRD_AXIS_PAIRS = 8
BASE = 10000.0


def axial_frequencies(
    head_dim: int, height: int, width: int, side: int, text_length: int = 0, third_axis: bool = True
) -> Tensor:
    """Rope frequencies of text positions, then of a grid of tokens, complex64 `[text + H * W, head_dim / 2]`."""
    pairs = head_dim // 2
    third = THIRD_AXIS_PAIRS if third_axis else 0
    axis = (pairs - third) // 2
    rates = BASE ** (-2.0 * torch.arange(axis, dtype=torch.float64) / (pairs - third))
    scale = side / math.sqrt(height * width)
    angles = torch.zeros(text_length + height * width, pairs, dtype=torch.float64)
    grid = angles[text_length:].view(height, width, pairs)
    grid[:, :, :axis] = (torch.arange(height) * scale)[:, None, None] * rates
    grid[:, :, axis : 2 * axis] = (torch.arange(width) * scale)[None, :, None] * rates
    if third:
        text = torch.arange(text_length, dtype=torch.float64) / max(text_length, 1) * side
        angles[:text_length, 2 * axis :] = text[:, None] * BASE ** (-torch.arange(third, dtype=torch.float64) / third)
    return _unit(angles)


def line_frequencies(head_dim: int, length: int) -> Tensor:
    """Rope frequencies of positions 0 to `length` - 1, complex64 `[length, head_dim / 2]`."""
    rates = BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return _unit(torch.arange(length)[:, None] * rates)


def _unit(angles: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x: Tensor, rope_frequencies: Tensor, half_split: bool = False) -> Tensor:
    """Rotate the rotary pairs of `[B, heads, N, D]` by rope frequencies `[N, D / 2]`; float32.

    Pairs are dimensions (2i, 2i + 1) or, if `half_split`, (i, i + D / 2).
    """
    if half_split:
        a, b = x.float().chunk(2, dim=-1)
        turned = torch.complex(a, b) * rope_frequencies
        return torch.cat([turned.real, turned.imag], dim=-1)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope_frequencies).flatten(-2)
