"""What is found out about outputs before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.commands import message

from mlx_starflow.media import outputs
from mlx_starflow.media.outputs import STDOUT, check_outputs


def refused(*files, **others):
    return message(check_outputs, files, **others)


def test_what_can_be_written(tmp_path):
    there = tmp_path / "there.csv"
    there.write_text("old")
    check_outputs([there, tmp_path / "new.png", None, STDOUT, Path(os.devnull), Path(os.devnull)])
    check_outputs(folders=[tmp_path, tmp_path / "a/b/c", None])
    check_outputs([there], inputs=[tmp_path, tmp_path / "none"])
    assert there.read_text() == "old" and list(tmp_path.iterdir()) == [there]


def test_what_cannot(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert refused(tmp_path / "no/a.csv").endswith(
        f"a.csv cannot be written: the folder {tmp_path / 'no'} does not exist"
    )
    assert refused(file / "a.csv").endswith(f"{file} is a file")
    assert refused(tmp_path).endswith("it is a folder")
    assert refused(folders=[file / "maps"]).endswith(f"{file} is a file; give a folder")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert refused(folders=[tmp_path / "link/maps"]).endswith("link is a link that leads nowhere; give a folder")
    for name in ("a" * 256, "a\0b", "a\nb/c"):
        assert "cannot be written: " in refused(tmp_path / name)
    for name in ("a" * 256, "no/" + "ä" * 128):
        assert "name is too long" in refused(folders=[tmp_path / name])


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refused(tmp_path / "a.png").endswith(f"there is no permission to write to {tmp_path}")
    assert refused(folders=[tmp_path / "maps"]).endswith(f"there is no permission to write to {tmp_path}")
    (tmp_path / "a.png").write_text("kept")
    assert refused(tmp_path / "a.png").endswith("there is no permission")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no file system that takes no files, whoever asks")
def test_a_folder_that_takes_no_files():
    """What the permissions promise is not what root gets."""
    assert refused(Path("/proc/a.png")).startswith("/proc/a.png cannot be written: ")


def test_two_of_one_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    assert "two outputs would be written to" in refused(tmp_path / "a.csv", tmp_path / "link/a.csv")
    assert "two outputs would be written to standard output" in refused(STDOUT, STDOUT)
    assert "two outputs" in refused(tmp_path / "maps", folders=[tmp_path / "maps"])


def test_inputs_are_not_written_over(tmp_path):
    picture, link, twin = (tmp_path / name for name in ("x.png", "link.png", "twin.png"))
    picture.write_text("dear")
    link.symlink_to(picture)
    os.link(picture, twin)
    for path in (picture, link, twin):
        assert (
            refused(path, inputs=[picture]) == f"{path} is read, and would be replaced: give another name to write to"
        )
    assert "is read" in refused(folders=[tmp_path / "."], inputs=[tmp_path])


def test_a_model_is_not_written_over(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert "is a file of the model in" in refused(tmp_path / "model.safetensors")
    (tmp_path / "noise.safetensors").write_text("")
    check_outputs([tmp_path / "noise.safetensors"])


def test_each_folder_is_tried_once(tmp_path, monkeypatch):
    tries = []
    monkeypatch.setattr(outputs, "_try", lambda folder, path: tries.append(folder))
    check_outputs([tmp_path / f"{number}.png" for number in range(9)])
    assert tries == [tmp_path]
