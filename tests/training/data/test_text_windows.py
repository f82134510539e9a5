"""Windows of a text: where they are, what gaps they have, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_starflow import StarflowError
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.text_windows import LONGEST_GAP, MOST_GAPS, TextWindows, split_text

CONFIG = TrainingConfig(steps=1, batch_size=4)
TEXT = np.arange(1000, dtype=np.int32)


def test_windows_are_pieces_of_the_text():
    data, rng = TextWindows(TEXT, 16, 3), np.random.default_rng(0)
    for _ in range(50):
        batch = data.batch(rng, CONFIG, 0.0)
        windows = batch["characters"]
        assert windows.shape == (4, 16) and batch["noise"].shape == (4, 16, 3)
        assert (np.diff(windows, axis=1) == 1).all()


@pytest.mark.parametrize("patch", [1, 2])
def test_orders_read_gaps_last(patch):
    data, rng = TextWindows(TEXT, 128, 3, patch), np.random.default_rng(0)
    count, none, gaps, lengths = 128 // patch, 0, [], []
    for _ in range(400):
        orders = data.batch(rng, CONFIG, 0.0)["order"]
        assert orders.shape == (4, 2, count) and (orders == orders[0]).all()
        forward, backward = orders[0]
        assert sorted(forward) == sorted(backward) == list(range(count))
        falls = np.flatnonzero(np.diff(forward) < 0)
        if not len(falls):
            none += 1
            continue
        # What is given is read first to last, and then what is not; backwards each last to first.
        given, hidden = np.split(forward, [falls[0] + 1])
        assert len(falls) == 1 and backward.tolist() == [*given[::-1], *hidden[::-1]]
        parts = np.split(hidden, np.flatnonzero(np.diff(hidden) > 1) + 1)
        gaps.append(len(parts))
        lengths.append(max(map(len, parts)))
    assert set(gaps) == set(range(1, MOST_GAPS + 1))
    assert min(lengths) == 1 and max(lengths) > LONGEST_GAP * count / 2
    # A gap at the window's end leaves its order as it is.
    assert 0.15 < none / 400 < 0.35


def test_validation_reads_each_window_once_where_it_is():
    data = TextWindows(TEXT, 16, 3, gaps=0.0)
    assert data.order.count == 62
    batch = data.arrays(np.array([0, 61]), np.random.default_rng(0), CONFIG, 1.0)
    assert batch["characters"][:, 0].tolist() == [0, 976]
    assert batch["order"][0].tolist() == [list(range(16)), list(range(16))[::-1]]


def test_what_is_held_out_is_from_all_over_the_text():
    trained, held = split_text(TEXT, 0.1)
    assert len(held) == 96 and sorted([*trained, *held]) == TEXT.tolist()
    assert held[0] < 125 and held[-1] == 999
    assert len(split_text(TEXT, 0.0)[1]) == 0


def test_a_short_text():
    with pytest.raises(StarflowError, match="a text of 31 characters is too short: two windows have 32"):
        TextWindows(TEXT[:31], 16, 3)
