"""Files take their place whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import is_special, left_behind, replacing, temporary_path


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


@pytest.mark.parametrize("name", ["n" * 246 + ".png", "ä" * 120 + ".safetensors", "n" * 255, "a." + "b" * 250])
def test_names_as_long_as_they_may_be(tmp_path, name):
    path = tmp_path / name
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = temporary_path(path)
    assert len(os.fsencode(own.name)) <= 255 and own.suffix in (path.suffix, "." + own.name.split(".")[-1])
    dead = own.with_name(own.name.replace(f".{os.getpid()}", f".{ended.pid}"))
    dead.write_text("half")
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_long_names_have_temporary_names_of_their_own(tmp_path):
    first, second = (temporary_path(tmp_path / f"{'n' * 240}-{number}.png") for number in (1, 2))
    assert first != second and first.suffix == ".png"


def test_a_pipe_is_written_to_and_stays(tmp_path):
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    assert is_special(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    with replacing(path) as temporary:
        temporary.write_text("new")
    reader.join(10)
    assert read == ["new"] and stat.S_ISFIFO(os.lstat(path).st_mode) and list(tmp_path.iterdir()) == [path]


def test_devices():
    assert all(is_special(Path(name)) for name in (os.devnull, "/dev/stdout"))
    with replacing(Path(os.devnull)) as temporary:
        temporary.write_text("new")
    assert stat.S_ISCHR(os.lstat(os.devnull).st_mode)


def test_a_link_to_a_device_is_not_followed(tmp_path):
    """The folder may be a stranger's."""
    link = tmp_path / "likelihood.json"
    link.symlink_to(os.devnull)
    assert not is_special(link)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_device():
    with (
        pytest.raises(StarflowError, match="/dev/full cannot be written: No space left on device"),
        replacing(Path("/dev/full")) as temporary,
    ):
        temporary.write_text("new")
