"""What a command that can go on does when it is told to stop."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mlx_starflow.cli.options.interrupt import resumable


@pytest.fixture(autouse=True)
def listening():
    """SIGINT means what it does in a terminal: a shell starts background programs deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm(capsys, number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended, resumable("the same command goes on"):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "the same command goes on\n"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
