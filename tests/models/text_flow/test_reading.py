"""Orders with gaps: what predicts each token, in both directions."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_starflow.models.text_flow.reading import START, UNKNOWN, Reading, gap_orders

GAPS = {
    "one": [3, 4, 5],
    "at the beginning": [0, 1],
    "at the end": [9, 10, 11],
    "several": [0, 3, 4, 8, 11],
    "everything": list(range(12)),
    "none": [],
}


def reading(name: str, flip: bool, ahead: int = 2) -> Reading:
    return Reading(gap_orders([place in GAPS[name] for place in range(12)])[flip], flip, ahead)


def test_orders_of_a_gap():
    forward, backward = gap_orders([False, True, True, False, False])
    assert forward.tolist() == [0, 3, 4, 1, 2]
    assert backward.tolist() == [4, 3, 0, 2, 1]


def test_a_gap_forwards_and_backwards():
    forward, backward = reading("one", False), reading("one", True)
    assert forward.order.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11, 3, 4, 5]
    assert forward.neighbours.tolist() == [START, 0, 1, UNKNOWN, 3, 4, 5, 6, 7, 2, 9, 10]
    assert forward.places.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11, 3, 4, 5]
    assert forward.distance.tolist() == [0] * 9 + [3, 2, 1]
    assert forward.ahead.tolist() == [[UNKNOWN] * 2] * 10 + [[UNKNOWN, 3], [3, 4]]
    assert backward.order.tolist() == [11, 10, 9, 8, 7, 6, 2, 1, 0, 5, 4, 3]
    assert backward.neighbours.tolist() == [START, 0, 1, 2, 3, 4, UNKNOWN, 6, 7, 5, 9, 10]
    assert backward.places.tolist() == [0, 12, 11, 10, 9, 8, 4, 3, 2, 7, 6, 5]
    assert backward.distance.tolist() == [0] * 9 + [3, 2, 1]
    assert backward.ahead.tolist() == [[UNKNOWN] * 2] * 10 + [[UNKNOWN, 6], [6, 7]]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", GAPS)
def test_what_predicts_a_token_has_been_read_before(name, flip):
    found = reading(name, flip, 3)
    order, step = found.order.tolist(), -1 if flip else 1
    first = 11 if flip else 0
    for number, place in enumerate(order):
        known = set(order[:number])
        neighbour = found.neighbours[number].item()
        if place == first:
            assert neighbour == START
        elif place - step in known:
            assert order[neighbour] == place - step and neighbour < number
        else:
            assert neighbour == UNKNOWN
        away = [(other - place) * step for other in known if (other - place) * step > 0]
        assert found.distance[number].item() == min(away, default=0)
        for nth, ahead in enumerate(found.ahead[number].tolist()):
            right = place + (nth + 1) * step
            assert (order[ahead] if ahead >= 0 else None) == (right if right in known else None)
            assert ahead >= 0 or ahead == UNKNOWN


@pytest.mark.parametrize("flip", [False, True])
def test_rows_are_neighbours_and_the_next_tokens(flip):
    found = reading("several", flip)
    # Tokens are the places, the start is 100, and what is not known is 0.
    x = mx.broadcast_to(found.order.astype(mx.float32)[None, :, None] + 1, (2, 12, 3))
    first, step = mx.full((2, 1, 3), 100.0), -1 if flip else 1
    right = []
    for number, place in enumerate(found.order.tolist()):
        own = {START: 100, UNKNOWN: 0}.get(found.neighbours[number].item(), place - step + 1)
        next_ones = [place + step * (nth + 1) + 1 for nth in range(2)]
        known = found.ahead[number].tolist()
        right.append([own, *(each if there >= 0 else 0 for each, there in zip(next_ones, known, strict=True))])
    for start, stop in ((0, 12), (5, 8), (11, 12)):
        table, numbers = found.rows(x, first, start, stop)
        assert numbers.shape == (stop - start, 3) and table.shape[::2] == (2, 3)
        assert table[1, :, 2][numbers].tolist() == right[start:stop]
