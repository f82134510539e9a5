"""A model directory is opened once, and tells what it holds."""

from __future__ import annotations

import builtins
import io
from collections import Counter
from pathlib import Path

import pytest
from helpers.commands import message
from helpers.model_directories import edit_config, save_flow

from mlx_starflow import load
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.hub import DEMO
from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Config


@pytest.fixture
def reads(monkeypatch):
    """How often each config file is opened."""
    counts: Counter[str] = Counter()
    opened = io.open

    def count(file, *arguments, **options):
        if Path(str(file)).name == "config.json":
            counts[str(Path(file).relative_to(DEMO))] += 1
        return opened(file, *arguments, **options)

    monkeypatch.setattr(io, "open", count)
    monkeypatch.setattr(builtins, "open", count)
    return counts


def test_each_config_is_read_once(reads):
    pipe = load("demo", low_memory=None)
    assert pipe.flow and pipe.text_encoder and pipe.vae
    assert reads == {"config.json": 1, "text_encoder/config.json": 1, "vae/config.json": 1}


def test_what_the_demo_holds():
    model = ModelDirectory.find("demo")
    assert model.path == DEMO
    assert isinstance(model.flow.config, FlowConfig)
    assert isinstance(model.text_encoder.config, T5Config)
    assert isinstance(model.vae.config, AutoencoderKLConfig)
    assert model.reads_prompts and model.has("text_encoder") and model.has("vae")
    assert model.flow.quantization["bits"] == 8 and model.vae.quantization is None
    assert model.pipeline["guidance"] > 0
    assert model.licences == ["NOTICE"]
    assert model.statistics_file.is_file() and model.plan_file.is_file()


def test_configs_need_no_networks(monkeypatch):
    """A network of billions of weights takes a while to build."""
    model = ModelDirectory(DEMO)
    for part in (model.flow, model.text_encoder, model.vae):
        monkeypatch.setattr(part, "_network", None)
        assert part.config


def test_a_flow_alone(tmp_path):
    model = ModelDirectory(save_flow(tmp_path))
    assert not model.has("vae") and model.pipeline == {} and model.licences == []
    for part in ("text_encoder", "vae"):
        assert f"is a flow alone: generating needs its {part}/ folder too" in message(getattr, model, part)
    edit_config(tmp_path, channels="many")
    assert message(getattr, ModelDirectory(tmp_path).flow, "config").startswith(f"{tmp_path / 'config.json'}: ")
