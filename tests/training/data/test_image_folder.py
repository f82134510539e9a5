from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import Order
from mlx_starflow.training.data.dropout import choose_caption
from mlx_starflow.training.data.labelled_images import LabelledImages
from mlx_starflow.training.data.views import augmented_crops
from mlx_starflow.training.recipes.text import CaptionedLatents, initialize_text_encoder, train_tokenizer


def write_lines(folder, *lines):
    folder.joinpath("metadata.jsonl").write_text("\n".join(lines))


def test_reading_a_folder(picture_folder):
    folder = ImageFolder.read(picture_folder, size=16)
    assert len(folder) == 6 and folder.images.shape == (6, 16, 16, 3) and folder.images.dtype == np.uint8
    assert folder.captions[1] == ["a green square", "green square"]
    assert folder.images[0, 8, 8].tolist() == [255, 0, 0] and folder.images[0, 0, 0].tolist() == [255] * 3


def test_splits_and_captions(picture_folder):
    lines = [
        {"file_name": "0.png", "text": "one"},
        {"file_name": "1.png", "split": "autoencoder"},
        {"file_name": "2.png", "text": "three", "split": "x"},
    ]
    write_lines(picture_folder, *map(json.dumps, lines), "", "  ")
    assert len(ImageFolder.read(picture_folder, size=8)) == 3
    folder = ImageFolder.read(picture_folder, size=8, splits=("train", "autoencoder"))
    assert [row["file_name"] for row in folder.rows] == ["0.png", "1.png"] and folder.captions == [["one"], [""]]
    only = folder.only("autoencoder")
    assert len(only) == 1 and np.array_equal(only.images[0], folder.images[1])
    with pytest.raises(StarflowError, match=r"has no usable picture of the splits held_out$"):
        ImageFolder.read(picture_folder, size=8, splits=("held_out",))


def test_other_sources(tmp_path):
    for name in ("red_panda", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (10, 8), "red").save(tmp_path / name / "1.png")
    folder = ImageFolder.read(tmp_path, size=4)
    assert folder.captions == [["cat"], ["red panda"]] and folder.rows[0] == {"label": "cat"}


def test_repeats():
    """A pass takes each sample so often; buckets are drawn by what is in them then; a measurement takes each once."""
    order = Order(4, [0, 0, 1, 0], [3, 1, 5, 1])
    assert order.length == 10
    rng = np.random.default_rng(0)
    taken = np.concatenate([order.take(1, rng) for _ in range(4000)])
    assert np.abs(np.bincount(taken) / 4000 - [0.3, 0.1, 0.5, 0.1]).max() < 0.02
    one = Order(3, repeats=[2, 1, 2])
    for _ in range(3):
        assert sorted(one.take(5, rng)) == [0, 0, 1, 2, 2]
    assert [chosen.tolist() for chosen in order.once(2)] == [[0, 1], [3], [2]]


def test_repeats_of_folders(tmp_path):
    for name in ("10_cat", "4_dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (10, 8), "red").save(tmp_path / name / "1.png")
    folder = ImageFolder.read(tmp_path, size=4)
    assert folder.captions == [["cat"], ["dog"]] and folder.repeats == [10, 4]
    assert LabelledImages.of(folder).order.length == 14


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"half"])
def test_unreadable_pictures_are_listed_and_left_out(picture_folder, content):
    path = picture_folder / "3.png"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.warns(UserWarning, match=r"pictures: skipped 1: 3.png \(.+\)$"):
        folder = ImageFolder.read(picture_folder, size=8)
    assert [skip.key for skip in folder.skipped] == ["3.png"]
    assert [row["file_name"] for row in folder.rows] == [f"{n}.png" for n in (0, 1, 2, 4, 5)]


def test_nothing_is_left(picture_folder):
    write_lines(picture_folder, '{"file_name": "0.png"}', '{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(StarflowError, match=r"skipped 2: 0.png \(no caption\), gone.png \(No such file.*\)$"):
        ImageFolder.read(picture_folder, size=8)
    with pytest.raises(StarflowError, match=r"nowhere does not exist; give a folder of pictures with captions"):
        ImageFolder.read(picture_folder / "nowhere", size=8)


def test_pictures_are_cut_to_squares(tmp_path):
    picture = Image.new("RGB", (30, 10), "blue")
    picture.paste("red", (10, 0, 20, 10))
    picture.save(tmp_path / "wide.png")
    write_lines(tmp_path, '{"file_name": "wide.png", "text": "x"}')
    pixels = ImageFolder.read(tmp_path, size=10).images[0]
    assert (pixels == (255, 0, 0)).all()


def test_views_are_moved_pictures():
    pictures = np.zeros((3, 16, 16, 3), np.uint8)
    views = augmented_crops(pictures, 8, np.random.default_rng(0), zoom=0.3, shift=1)
    assert views.shape == (3, 8, 8, 3)
    assert ((views == 0) | (views == 255)).all() and (views == 0).mean() > 0.3
    same = augmented_crops(pictures, 8, np.random.default_rng(0), zoom=0.3, shift=1)
    assert np.array_equal(views, same)
    assert not augmented_crops(pictures, 8, np.random.default_rng(0), zoom=0.0, shift=0).any()


def test_order_passes_over_everything():
    rng, order = np.random.default_rng(0), Order(7)
    passes = np.concatenate([order.take(n, rng) for n in (3, 3, 3, 12)]).reshape(3, 7)
    assert (np.sort(passes) == np.arange(7)).all()
    assert not np.array_equal(passes[0], passes[1])
    assert order.take(20, rng).shape == (20,) and len(order.left) == 1


def test_order_in_buckets():
    buckets = np.array(["wide", "high", "wide", "wide", "square", "wide"])
    rng, order = np.random.default_rng(0), Order(6, buckets)
    taken = [order.take(2, rng) for _ in range(6000)]
    assert all(len(set(buckets[part])) == 1 for part in taken)
    # In the long run each sample comes as often as any other, also where its bucket is smaller than a batch.
    counts = np.bincount(np.concatenate(taken), minlength=6)
    assert np.abs(counts / 2000 - 1).max() < 0.1
    wide = np.concatenate([part for part in taken if buckets[part[0]] == "wide"])
    passes = wide[: len(wide) // 4 * 4].reshape(-1, 4)
    assert (np.sort(passes) == [0, 2, 3, 5]).all()


def test_order_goes_on_where_it_was():
    for buckets in (None, [0, 1, 1, 0, 0, 2, 1]):
        straight, first, second = (Order(7, buckets) for _ in range(3))
        rng, again = np.random.default_rng(1), np.random.default_rng(1)
        expected = [straight.take(3, rng) for _ in range(20)]
        found = [first.take(3, again) for _ in range(9)]
        assert first.left.dtype == np.int64
        second.left = first.left
        found += [second.take(3, again) for _ in range(11)]
        assert np.array_equal(expected, found)


def test_order_of_a_single_pass():
    order = Order(7, [0, 1, 1, 0, 0, 2, 1])
    order.take(2, np.random.default_rng(0))
    before = order.left
    assert [part.tolist() for part in order.once(2)] == [[0, 3], [4], [1, 2], [6], [5]]
    assert [part.tolist() for part in Order(5).once(3)] == [[0, 1, 2], [3, 4]]
    assert np.array_equal(order.left, before)


def test_order_of_other_data():
    order = Order(5)
    order.left = np.array([4, 0])
    for bad in ([5], [-1]):
        with pytest.raises(StarflowError, match="the checkpoint is of a training on other data"):
            order.left = np.array(bad)
    assert order.left.tolist() == [4, 0]


def test_choosing_captions():
    rng = np.random.default_rng(0)
    drawn = [choose_caption(["usual", "rare", "other"], rng, 0.1) for _ in range(20000)]
    shares = {text: drawn.count(text) / len(drawn) for text in ("", "usual", "rare", "other")}
    assert shares == {text: pytest.approx(share, abs=0.01) for text, share in
                      (("", 0.1), ("usual", 0.54), ("rare", 0.18), ("other", 0.18))}  # fmt: skip
    assert {choose_caption(["only"], rng, 0.0) for _ in range(100)} == {"only"}
    assert {choose_caption(["only", "two"], rng, 1.0) for _ in range(100)} == {""}


def test_tokenizer_of_captions(tmp_path):
    path = tmp_path / "new" / "spiece.model"
    tokenizer = train_tokenizer(["a red square", "a blue disc", ""], path, 100)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    ids = tokenizer.encode("A red disc")
    assert ids[-1] == 1 and 2 not in ids
    assert ids == tokenizer.encode("a red  disc")
    # It is kept as it is, also for other captions.
    assert train_tokenizer(["something else"], path, 100).encode("a red disc") == ids
    assert [item.name for item in path.parent.iterdir()] == ["spiece.model"]


def test_tokenizer_has_room_for_every_character(tmp_path):
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    tokenizer = train_tokenizer([letters[i : i + 10] for i in range(0, 300, 10)], tmp_path / "spiece.model", 50)
    assert 2 not in tokenizer.encode(letters)


def test_no_captions(tmp_path):
    with pytest.raises(StarflowError, match="no picture has a caption"):
        train_tokenizer(["", "  "], tmp_path / "spiece.model", 100)


def test_batches_of_captioned_latents(tmp_path):
    tokenizer = train_tokenizer(["red", "green", "blue"], tmp_path / "spiece.model", 100)
    latents = np.arange(3 * 2 * 4 * 4, dtype=np.float32).reshape(3, 2, 4, 4, 1)
    data = CaptionedLatents(latents, [["red"], ["green"], ["blue"]], tokenizer, text_length=5, tokens=4)
    config = TrainingConfig(steps=1, batch_size=3, caption_dropout=0.0)
    batch = data.batch(np.random.default_rng(0), config, 0.0)
    assert {name: array.shape for name, array in batch.items()} == {
        "latents": (3, 4, 4, 1), "noise": (3, 4, 4, 1), "context_mask": (3, 4), "ids": (3, 5), "mask": (3, 5),
    }  # fmt: skip
    for row, ids in zip(batch["latents"], batch["ids"], strict=True):
        index = int(row[0, 0, 0]) // 32
        assert np.array_equal(ids, tokenizer.batch([["red", "green", "blue"][index]], 5)[0][0])
    assert all(array.dtype in (np.float32, np.int32) for array in batch.values())


def test_text_encoder_starts_with_sensible_logits():
    encoder = T5Encoder(T5Config(50, 64, 16, 128, 2, 4, feed_forward_proj="gated-gelu"))
    initialize_text_encoder(encoder)
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    assert np.array(attention.q.weight).std() == pytest.approx((64 * 16) ** -0.5, rel=0.1)
    assert np.array(attention.o.weight).std() == pytest.approx(64**-0.5, rel=0.1)
    assert np.array(encoder.shared.weight).std() == pytest.approx(1, rel=0.1)
    assert np.array(encoder.encoder.block[1].layer[1].DenseReluDense.wo.weight).std() == pytest.approx(
        128**-0.5, rel=0.1
    )
