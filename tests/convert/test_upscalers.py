"""Files of upscalers: which network they are of, and what is no such file."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.upscalers import bsrgan_names, esrgan_names, rrdb_tensors, span_tensors, srvgg_tensors, write_upscaler
from mlx.utils import tree_flatten

from mlx_starflow.convert.upscaler_files import PUBLISHED, find_upscaler
from mlx_starflow.convert.upscalers import open_upscaler
from mlx_starflow.errors import StarflowError
from mlx_starflow.models.upscalers import SPAN, RRDBNet, SRVGGNet


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where upscalers are looked for."""
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/upscalers").mkdir(parents=True)
    return tmp_path / "cache/upscalers"


@pytest.mark.parametrize(
    ("tensors", "kind", "scale"),
    [
        (rrdb_tensors(), RRDBNet, 4),
        (rrdb_tensors(unshuffle=2), RRDBNet, 2),
        (rrdb_tensors(unshuffle=4), RRDBNet, 1),
        (rrdb_tensors(doublings=3), RRDBNet, 8),
        (srvgg_tensors(scale=3), SRVGGNet, 3),
        (span_tensors(scale=2), SPAN, 2),
        (span_tensors(normalized=False), SPAN, 4),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "params_ema.", "params.module.", "model."])
def test_network_and_scale_are_read_from_the_tensors(tmp_path, tensors, kind, scale, prefix):
    path = write_upscaler(tmp_path / "a.pth", {prefix + name: each for name, each in tensors.items()})
    network = open_upscaler(path).read()
    assert isinstance(network, kind) and network.scale == scale
    assert all(value.dtype == mx.float32 for _, value in tree_flatten(network.parameters()))


@pytest.mark.parametrize("rename", [esrgan_names, bsrgan_names])
@pytest.mark.parametrize("doublings", [0, 1, 2])
def test_other_names_are_the_same_network(tmp_path, rename, doublings):
    tensors = rrdb_tensors(doublings=doublings)
    renamed = rename(tensors)
    assert not set(renamed) & {"body.0.rdb1.conv1.weight", "conv_hr.weight"}
    pictures = mx.random.uniform(shape=(1, 6, 5, 3))
    networks = [
        open_upscaler(write_upscaler(tmp_path / name, each)).read()
        for name, each in (("a.pth", tensors), ("b.pth", renamed))
    ]
    assert mx.array_equal(networks[0](pictures), networks[1](pictures))


def test_half_precision(tmp_path):
    tensors = {name: each.astype(np.float16) for name, each in srvgg_tensors().items()}
    network = open_upscaler(write_upscaler(tmp_path / "a.pth", tensors)).read()
    assert network.body[0].weight.dtype == mx.float32


# ---- what is no such file


def without(tensors, name):
    return {each: value for each, value in tensors.items() if each != name}


def changed(tensors, name, value):
    return {**tensors, name: np.asarray(value, np.float32)}


def far_block():
    """A name that would ask for a thousand million blocks."""
    tensors = rrdb_tensors()
    return {name.replace("body.1.", "body.999999999."): each for name, each in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blocks.0.weight": np.zeros((2, 2), np.float32)}, "is no upscaler that can be read"),
        (far_block(), "number 1 is missing"),
        (without(rrdb_tensors(), "conv_hr.bias"), "conv_hr.bias is missing: is the file complete?"),
        (without(rrdb_tensors(), "body.1.rdb3.conv5.weight"), "body.1.rdb3.conv5.weight is missing"),
        (changed(rrdb_tensors(), "extra.weight", [1]), "no place for: extra.weight"),
        (changed(rrdb_tensors(), "conv_first.weight", np.zeros(5)), "conv_first.weight has the shape [5]"),
        (changed(rrdb_tensors(), "conv_first.weight", np.zeros((8, 5, 3, 3))), "makes 3 channels of 5"),
        (changed(rrdb_tensors(), "conv_hr.weight", np.zeros((8, 8, 1, 1))), "conv_hr.weight does not fit the others"),
        (changed(rrdb_tensors(), "conv_hr.bias", [np.nan] * 8), "conv_hr.bias holds what is no finite number"),
        (srvgg_tensors() | {"body.8.weight": np.zeros((50, 8, 3, 3), np.float32)}, "no square times 3"),
        (without(srvgg_tensors(), "body.4.weight"), "body.4.weight is missing"),
        (span_tensors() | {"conv_2.sk.weight": np.zeros((3, 3, 1, 1), np.float32)}, "of conv_2 do not fit together"),
        (without(span_tensors(), "block_3.c2_r.conv.1.bias"), "block_3.c2_r.conv.1.bias is missing"),
        (rrdb_tensors() | {"conv_hr.weight": np.zeros((8, 8, 3, 3), np.int8)}, "not real numbers"),
        (rrdb_tensors(doublings=4, blocks=1), "it enlarges by 16; by 1 to 8 can be"),
        ({**rrdb_tensors(), "trunk_conv.bias": np.zeros(8, np.float32)}, "conv_body.bias is there twice"),
    ],
)
def test_refused(tmp_path, tensors, said):
    path = write_upscaler(tmp_path / "a.pth", tensors)
    line = message(lambda: open_upscaler(path).read())
    assert said in line and str(path) in line


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated(tmp_path, suffix):
    path = write_upscaler(tmp_path / f"a{suffix}", srvgg_tensors())
    content = path.read_bytes()
    for share in (0, 0.02, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        assert path.name in message(lambda: open_upscaler(path).read())


def test_no_file(tmp_path):
    assert "is no file" in message(open_upscaler, tmp_path / "a.pth")
    assert "is no file" in message(open_upscaler, tmp_path)


# ---- where they are found


def test_without_weights_the_message_says_what_to_get(folder):
    for scale, file in ((2, "RealESRGAN_x2plus.pth"), (4, "RealESRGAN_x4plus.pth")):
        line = message(find_upscaler, None, scale)
        assert "https://github.com/xinntao/Real-ESRGAN/releases/download/v0." in line
        assert f"/{file} (BSD-3-Clause) into {folder}" in line and "--upscale-model" in line
    assert "upscaling needs a file of weights" in message(find_upscaler, None)


def test_the_published_files_come_first(folder):
    for name in ("RealESRGAN_x4plus.pth", "another.pth"):
        write_upscaler(folder / name, rrdb_tensors())
    assert find_upscaler(None, 4).path == folder / "RealESRGAN_x4plus.pth"
    assert find_upscaler(None, 2).path == folder / "RealESRGAN_x4plus.pth", "its result is made smaller"
    write_upscaler(folder / "RealESRGAN_x2plus.pth", rrdb_tensors(unshuffle=2))
    assert find_upscaler(None, 2).path == folder / "RealESRGAN_x2plus.pth"
    assert find_upscaler(None).path == folder / "RealESRGAN_x4plus.pth"
    assert find_upscaler("another").path == find_upscaler("another.pth").path == folder / "another.pth"


def test_of_several_unknown_files_one_is_named(folder):
    write_upscaler(folder / "a.pth", rrdb_tensors())
    assert find_upscaler(None, 4).path == folder / "a.pth"
    write_upscaler(folder / "b.pth", srvgg_tensors())
    assert "several upscalers (a.pth, b.pth): name one with --upscale-model" in message(find_upscaler, None, 4)


def test_a_file_that_enlarges_less(folder, tmp_path):
    write_upscaler(folder / "RealESRGAN_x2plus.pth", rrdb_tensors(unshuffle=2))
    assert "no file in" in message(find_upscaler, None, 4)
    assert "enlarges by 2, not by 4: download" in message(find_upscaler, "RealESRGAN_x2plus", 4)
    assert "there is no file c.pth, nor one of that name in" in message(find_upscaler, "c.pth", 4)
    assert "is a folder" in message(find_upscaler, tmp_path, 4)


def test_published_files_have_licences():
    assert {each.licence for each in PUBLISHED} == {"BSD-3-Clause", "Apache-2.0"}
    assert [each.scale for each in PUBLISHED[:2]] == [4, 2]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, suffix):
    path = write_upscaler(tmp_path / f"a{suffix}", srvgg_tensors(4, 1, 2))
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        # Where the names and shapes are, at the beginning, or anywhere.
        place = int(rng.integers(0, 2500 if rng.random() < 0.7 else len(content)))
        count = int(rng.integers(1, 5))
        kind = rng.integers(0, 3)
        if kind == 0:
            damaged[place : place + count] = rng.bytes(count)
        elif kind == 1:
            del damaged[place : place + count]
        else:
            damaged[place:place] = rng.bytes(count)
        path.write_bytes(damaged)
        try:
            open_upscaler(path).read()
        except StarflowError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 50
