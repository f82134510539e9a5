"""The gallery: a folder that is its own index."""

from __future__ import annotations

import os

import pytest
from helpers.commands import message
from PIL import Image

from mlx_starflow.media.images import save_image
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.server.gallery import Gallery
from mlx_starflow.server.refusals import Refusal


@pytest.fixture
def gallery(tmp_path):
    return Gallery(tmp_path / "pictures")


def red(side: int = 4) -> Image.Image:
    return Image.new("RGB", (side, side), "red")


def test_what_is_added_is_found_again_by_another_server(gallery):
    items = [gallery.add(red(), {"prompts": ["a"], "seeds": [number]}) for number in range(3)]
    video = gallery.add_video([red(), red()], 16, {"prompts": ["b"]})
    assert [item.id for item in [*items, video]] == sorted(item.id for item in [*items, video])
    for each in (gallery, Gallery(gallery.folder)):
        page, more = each.page()
        assert [item.id for item in page] == [video.id, *[item.id for item in items[::-1]]] and not more
        assert page[0].kind == "video" and page[1].metadata == {"prompts": ["a"], "seeds": [2]}
        assert page[1].describe()["url"] == f"/api/gallery/{items[2].id}.png"
        assert abs(page[1].created - items[2].path.stat().st_mtime) < 5
        assert each.content(page[1]) == items[2].path.read_bytes()


def test_its_files_are_those_that_the_command_writes(gallery, tmp_path):
    metadata = {"model": "demo", "prompts": ["ä cat"], "seeds": [7]}
    item = gallery.add(red(), metadata)
    save_image(red(), tmp_path / "out.png", metadata)
    assert item.path.read_bytes() == (tmp_path / "out.png").read_bytes()
    assert read_metadata(item.path) == metadata


def test_pages(gallery):
    ids = [gallery.add(red(), {}).id for _ in range(5)][::-1]
    page, more = gallery.page(2)
    assert [item.id for item in page] == ids[:2] and more
    page, more = gallery.page(3, before=page[-1].id)
    assert [item.id for item in page] == ids[2:] and not more


def test_what_comes_and_goes_by_itself(gallery):
    item = gallery.add(red(), {})
    assert len(gallery) == 1
    other = Gallery(gallery.folder).add(red(), {})
    assert gallery.find(other.id).size == (4, 4)
    item.path.unlink()
    with pytest.raises(Refusal):
        gallery.content(item)
    assert [each.id for each in gallery.page()[0]] == [other.id]
    gallery.remove(other.id)
    assert not other.path.exists() and len(gallery) == 0


def test_what_is_not_the_gallerys_is_neither_shown_nor_touched(gallery, tmp_path):
    id = gallery.add(red(), {}).id
    other = "20200101-000000-000000-0000000"
    strange = ["photo.png", f"{other}z.png", f"{other}0.txt", f"{other}1.png"]
    for name in strange:
        (gallery.folder / name).write_text("nothing")
    (gallery.folder / f"{other}2.png").symlink_to(tmp_path / "elsewhere.png")
    save_image(red(), tmp_path / "elsewhere.png", {})
    found = [item.id for item in Gallery(gallery.folder).page()[0]]
    assert found == [id] and all((gallery.folder / name).exists() for name in strange)
    for wrong in ("", "..", "../elsewhere", f"{id}.png", f"{other}2", id.upper() + "\0", "x" * 31):
        with pytest.raises(Refusal):
            gallery.find(wrong)


def test_what_a_killed_process_left_is_taken_away(gallery):
    gallery.add(red(), {})
    dead, alive = 2**22 + 1, os.getpid()
    half = gallery.folder / f".20200101-000000-000000-00000000.{dead}.png"
    upload = gallery.folder / f".scratch-{'0' * 16}.{dead}.safetensors"
    others = gallery.folder / f".20200101-000000-000000-00000001.{alive}.png"
    for path in (half, upload, others):
        path.write_bytes(b"half")
    again = Gallery(gallery.folder)
    assert not half.exists() and not upload.exists() and others.exists()
    assert len(again) == 1


def test_scratch_files_are_gone_afterwards(gallery):
    with gallery.scratch(".safetensors") as path:
        path.write_bytes(b"noise")
        assert path.parent == gallery.folder and len(gallery) == 0
    assert list(gallery.folder.iterdir()) == []


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used" in message(Gallery, tmp_path / "file")


def test_over_http(server):
    picture = server.post("/api/generate", prompt="a cat", seed=1).json()["result"]["pictures"][0]
    id, url = picture["id"], picture["url"]
    items = server.client.get("/api/gallery?limit=1").json()
    assert items["items"][0]["id"] == id
    assert server.client.get(f"/api/gallery/{id}").json()["item"]["metadata"]["seeds"] == [1]
    answer = server.client.get(url)
    assert answer.headers["content-type"] == "image/png" and "immutable" in answer.headers["cache-control"]
    assert server.client.get(url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert "attachment" in server.client.get(url + "?download=true").headers["content-disposition"]
    assert server.client.get(url.replace(".png", ".webp")).headers["content-type"] == "image/webp"
    assert server.client.get(url.replace(".png", ".gif")).status_code == 404
    assert server.client.delete(f"/api/gallery/{id}").json() == {"deleted": id}
    assert server.client.get(url).status_code == 404
