"""Pictures that a command is given."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message
from helpers.images import write_images
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.image_files import find_images, read_image


def test_files_and_plain_folders(tmp_path):
    first, second = write_images(tmp_path / "a", 2)
    write_images(tmp_path / "b" / "deeper", 1)
    write_images(tmp_path / "b", 1)
    found = find_images([second, tmp_path / "b", first])
    names = [str(second), str(tmp_path / "b/0.png"), str(tmp_path / "b/deeper/0.png"), str(first)]
    assert [each.name for each in found] == names
    assert all(each.caption == "" for each in found)
    assert np.array_equal(np.asarray(found[0].open()), np.asarray(Image.open(second)))


def test_captions_and_splits(tmp_path):
    write_images(tmp_path, 3, [{"text": f"number {n}", "split": "held_out" if n else "train"} for n in range(3)])
    assert [each.caption for each in find_images([tmp_path])] == ["number 0", "number 1", "number 2"]
    assert [each.caption for each in find_images([tmp_path], "held_out")] == ["number 1", "number 2"]
    assert "no pictures of the split 'test'" in message(find_images, [tmp_path], "test")


def test_text_files_and_classes(tmp_path):
    write_images(tmp_path / "texts", 2)
    (tmp_path / "texts/1.txt").write_text("one")
    assert [each.caption for each in find_images([tmp_path / "texts"])] == ["", "one"]
    write_images(tmp_path / "classes/red_apple", 1)
    assert [each.caption for each in find_images([tmp_path / "classes"])] == ["red apple"]


def test_read_image(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(path)
    assert np.array_equal(np.asarray(read_image(path)), np.full((2, 2, 3), 255))


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_unreadable_pictures(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    (found,) = find_images([path])
    assert f"cannot read the picture {path}" in message(found.open)


def test_mistakes(tmp_path):
    assert "does not exist" in message(find_images, [tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    assert "holds no training data" in message(find_images, [tmp_path / "empty"])
    assert "cannot read the picture" in message(read_image, tmp_path / "none.png")


def test_links_out_of_a_folder_are_told(tmp_path):
    write_images(tmp_path / "other", 1)
    write_images(tmp_path / "data", 2)
    (tmp_path / "data/more").symlink_to(tmp_path / "other")
    (tmp_path / "data/2.png").symlink_to(tmp_path / "other/0.png")
    with pytest.warns(UserWarning, match=r"skipped 1: more \(a link out of the data: copy it there\)"):
        found = find_images([tmp_path / "data"])
    assert len(found) == 3 and found[0].open().size == (8, 8)
    with pytest.raises(StarflowError, match=r"2.png: it leads out of the folder: copy it there"):
        found[2].open()
