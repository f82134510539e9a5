"""Adapters, statistics and copies know the weights that they were made for."""

from __future__ import annotations

import shutil
import warnings
from contextlib import nullcontext

import mlx.core as mx
import pytest
from helpers.commands import Command
from helpers.model_directories import edit_weights, write_image_model

from mlx_starflow import load_flow
from mlx_starflow.model_dir.adapters import FINGERPRINT
from mlx_starflow.model_dir.directory import NetworkDirectory
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.model_dir.fingerprint import fingerprint, read_made_of
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.saving import copy_network
from mlx_starflow.training.finetuning.adapters import AdapterConfig, adapter_layers, attach, save_adapter
from mlx_starflow.training.finetuning.fuse import fuse_model

info = Command("info")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def other(model, tmp_path):
    """The same with other weights."""
    copy = shutil.copytree(model, tmp_path / "other")
    name = next(name for name in load_weights(copy) if ".proj_out." in name)
    edit_weights(copy, **{name.replace(".", "__"): mx.array(load_weights(copy)[name]) + 1})
    return copy


def write_adapter(model, folder, about):
    flow = load_flow(model)
    config = AdapterConfig(rank=2)
    attach(flow, config)
    for layer in adapter_layers(flow).values():
        layer.lora_b = 0.2 * mx.ones(layer.lora_b.shape)
    return save_adapter(folder, flow, config, about)


@pytest.mark.parametrize("says", [True, False])
def test_an_adapter_of_other_weights_is_said(model, other, tmp_path, says):
    adapter = write_adapter(model, tmp_path / "adapter", {FINGERPRINT: fingerprint(model)} if says else {})
    quantized = quantize_model(model, tmp_path / "quantized", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (model, quantized):
            load_flow(each, adapters=[(adapter, 1)])
        fuse_model(model, [(adapter, 1)], tmp_path / "fused")
    expected = pytest.warns(UserWarning, match="was trained on other weights than those in") if says else nullcontext()
    with expected:
        load_flow(other, adapters=[(adapter, 1)])
    with expected:
        fuse_model(other, [(adapter, 1)], tmp_path / "fused")


def test_fused_adapters_make_other_weights(model, tmp_path):
    adapter = write_adapter(model, tmp_path / "adapter", {})
    marks = [fingerprint(model)]
    for strength in (1, 0.5):
        fuse_model(model, [(adapter, strength)], tmp_path / f"fused-{strength}")
        marks.append(fingerprint(tmp_path / f"fused-{strength}"))
    fuse_model(tmp_path / "fused-1", [(adapter, 1)], tmp_path / "twice")
    marks.append(fingerprint(tmp_path / "twice"))
    assert len(set(marks)) == 4
    fuse_model(model, [(adapter, 1)], tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(quantize_model(tmp_path / "again", tmp_path / "q", 8))
    assert fingerprint(tmp_path / "again") == marks[1]


def test_a_quantized_copy_says_what_it_is_of(model, tmp_path):
    source = shutil.copytree(model, tmp_path / "source")
    copy = quantize_model(source, tmp_path / "copy", 8)
    mark = fingerprint(source)
    assert read_made_of(copy) == (str(source), mark)
    assert f"made of        {source}, weights {mark}\n" in info(copy).stdout
    name = next(name for name in load_weights(source) if ".proj_out." in name)
    edit_weights(source, **{name.replace(".", "__"): mx.array(load_weights(source)[name]) + 1})
    assert f"{source}, weights {mark}; that model has other weights now\n" in info(copy).stdout
    shutil.rmtree(source)
    assert f"made of        {source}, weights {mark}\n" in info(copy).stdout
    (copy / "made_of.json").write_text('{"model": 3}')
    assert "made_of.json is damaged" in info.mistake(copy)


def test_a_copy_that_is_not_there_any_more(model, other, tmp_path):
    quantize_model(model, tmp_path / "copy", 8)
    copy_network(NetworkDirectory.flow(other), tmp_path / "copy")
    assert read_made_of(tmp_path / "copy") is None and read_made_of(model) is None
