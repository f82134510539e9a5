"""Progress where there is no terminal: a line a minute, with what is left."""

from __future__ import annotations

import io

import pytest

from mlx_starflow.sampling import bars
from mlx_starflow.sampling.bars import Bar


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(bars.time, "monotonic", lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_line_a_minute(clock):
    stream = io.StringIO()
    with Bar(total=100, desc="sampling", unit="tok", disable=None, file=stream) as bar:
        for _ in range(10):
            clock.now += 25
            bar.update(10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in stream.getvalue()
    assert lines[0] == "sampling: 30 of 100 tok, 01:15 so far, about 02:55 left"


def test_nothing_of_what_is_short(clock):
    stream = io.StringIO()
    for _ in Bar(range(5), desc="reading", disable=None, file=stream):
        clock.now += 1
    assert stream.getvalue() == ""


def test_it_can_be_off_and_on(clock):
    for disable, told in ((True, False), (False, True)):
        stream = io.StringIO()
        for _ in Bar(range(5), disable=disable, file=stream):
            clock.now += 100
        assert bool(stream.getvalue()) == told


def test_what_has_no_end_is_counted(clock):
    stream = io.StringIO()
    with Bar(desc="pictures", disable=None, file=stream, unit="picture") as bar:
        clock.now += 61
        bar.update(4)
    assert stream.getvalue() == "pictures: 4 picture, 01:01 so far\n"
