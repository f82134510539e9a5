"""Files take their place whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import left_behind, replacing


def test_the_new_file_takes_the_old_one_s_place(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path):
    path = tmp_path / "note.txt"
    with pytest.raises(StarflowError, match=r"note.txt cannot be written: No space left on device"), replacing(path):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_what_ended_processes_left_is_taken_away(tmp_path):
    path = tmp_path / "note.txt"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive, other = (
        tmp_path / name for name in (f".note.{ended.pid}.txt", f".note.{os.getppid()}.txt", f".notes.{ended.pid}.txt")
    )
    for each in (dead, alive, other):
        each.write_text("half")
    assert left_behind(path) == [dead]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert {each.name for each in tmp_path.iterdir()} == {"note.txt", alive.name, other.name}
