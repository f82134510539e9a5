from __future__ import annotations

import pytest

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.buckets import RATIOS, bucket_size, closest_ratio, ratio_value


def test_sizes_are_the_releases():
    """What its rounding gives at 256 pixels with the image autoencoder (steps of 8), and at 640 with the video one."""
    assert [bucket_size(ratio, 256, 8) for ratio in RATIOS] == [
        (256, 256), (208, 312), (312, 208), (344, 192), (192, 344), (232, 288), (288, 232), (392, 168), (168, 392),
    ]  # fmt: skip
    assert bucket_size("16:9", 640, 16) == (848, 480)
    # Half a step goes to the even multiple.
    assert bucket_size("1:1", 12, 8) == (16, 16)
    assert bucket_size("1:1", 20, 8) == (16, 16)


def test_a_bucket_is_never_empty():
    assert bucket_size("21:9", 8, 8) == (16, 8)
    assert bucket_size("9:21", 3, 8) == (8, 8)


def test_closest():
    assert all(closest_ratio(*bucket_size(ratio, 1024, 8)) == ratio for ratio in RATIOS)
    assert closest_ratio(1000, 1) == "21:9" and closest_ratio(1, 1000) == "9:21"
    assert closest_ratio(2, 1) == "16:9" and closest_ratio(1, 2) == "9:16"
    # By the logarithm: the border between 4:5 and 1:1 is the square root of 4/5, and mirrored at 5:4.
    assert [closest_ratio(w, 10000) for w in (8944, 8945)] == ["4:5", "1:1"]
    assert [closest_ratio(10000, h) for h in (8944, 8945)] == ["5:4", "1:1"]
    assert closest_ratio(300, 100, ["1:1", "2:3"]) == "1:1"


def test_what_is_no_ratio():
    assert ratio_value("16:9") == 16 / 9
    for text in ("", "16", "16:", ":9", "0:1", "1:0", "-1:2", "a:b", "1:2:3", "1.5:1"):
        with pytest.raises(StarflowError, match="is not an aspect ratio: write it as width:height"):
            ratio_value(text)
