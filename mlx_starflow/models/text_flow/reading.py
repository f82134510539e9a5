"""Orders in which the blocks of a text flow read a text with gaps, and what predicts each token in them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

START, UNKNOWN = -1, -2
"""Instead of a neighbour's number: the token is the first of the text, or its neighbour has not been read yet."""


class Reading:
    """An order of a text's places, in which some are read after others that come later in the text.

    As without a gap a token is predicted from what the block has read, and its input is its own neighbour, the token
    before it in the text, if that is known; the token that was read just before it may be from the other end of the
    text. In a gap it is told besides how far it is to the end of the gap, and reads those of the next tokens that are
    known.

    Args:
        order: places of the tokens, first to last, `[N]`.
        flip: the block reads last to first: of two neighbours the later one comes before the other.
        ahead: how many of the next tokens are read.

    Attributes:
        order: the same.
        neighbours: number in the order of each token's neighbour, or `START` or `UNKNOWN`, `[N]`.
        ahead: numbers of the next tokens in the text, `[N, ahead]`, or `UNKNOWN`.
        distance: from each token to the nearest one after it that is known, `[N]`; 0: none is.
        places: where the neighbours stand in the text, plus 1; 0: the start, `[N]`.
    """

    def __init__(self, order: mx.array, flip: bool, ahead: int):
        length, step = order.shape[0], -1 if flip else 1
        numbers = mx.arange(length)
        number_at = mx.argsort(order).astype(mx.int32)
        self.order = order
        places = order[:, None] + step * mx.array([-1, *range(1, ahead + 1)])
        inside = (places >= 0) & (places < length)
        found = number_at[mx.clip(places, 0, length - 1)]
        found = mx.where(inside & (found < numbers[:, None]), found, UNKNOWN)
        self.neighbours = mx.where(inside[:, 0], found[:, 0], START)
        self.places = mx.where(inside[:, 0], places[:, 0] + 1, 0)
        self.ahead = found[:, 1:]
        away = (numbers - order[:, None]) * step
        nearest = mx.where((away > 0) & (number_at < numbers[:, None]), away, length).min(axis=1)
        self.distance = mx.where(nearest < length, nearest, 0)

    def rows(self, x: mx.array, first: mx.array, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """What predicts tokens `start` to `stop`, as rows of an array.

        Args:
            x: tokens `[B, N, C]`, in the order.
            first: the neighbour of the text's first token, `[B, 1, C]`.

        Returns:
            The array, `[B, R, C]`, which has 0 for what is not known, and numbers of its rows,
            `[stop - start, 1 + ahead]`: the neighbours', and those of the next tokens.
        """
        own, ahead = self.neighbours[start:stop, None], self.ahead[start:stop]
        numbers = mx.concatenate([own, ahead], axis=1)
        length = x.shape[1]
        numbers = mx.where(numbers == START, length, mx.where(numbers == UNKNOWN, length + 1, numbers))
        table = mx.concatenate([x, first.astype(x.dtype), mx.zeros_like(x[:, :1])], axis=1)
        if stop - start == length:
            return table, numbers
        # A few tokens read a few rows.
        few = table[:, numbers.reshape(-1)]
        return few, mx.arange(numbers.size).reshape(numbers.shape)


def gap_orders(hidden: Sequence[bool]) -> tuple[mx.array, mx.array]:
    """Orders of the places 0 to N - 1 in which those that are hidden, `[N]`, come last.

    Returns:
        `[N]` twice, int32: each part first to last, and each part last to first.
    """
    given = [place for place, gap in enumerate(hidden) if not gap]
    gaps = [place for place, gap in enumerate(hidden) if gap]
    return mx.array(given + gaps, mx.int32), mx.array(given[::-1] + gaps[::-1], mx.int32)
