"""Predicted memory of models of classes against what MLX says it held, and what is refused and said because of it."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import Command, message
from helpers.peaks import one_at_a_time
from mlx.utils import tree_flatten

from mlx_starflow import load
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.hub import DEMO
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.itarflow import ITarFlow, ITarFlowConfig
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.planning import limits
from mlx_starflow.planning.class_memory import class_plans, plan_classes

info, generate = Command("info"), Command("generate")

SHAPE = {"img_size": 32, "channel_size": 3, "num_classes": 3, "cfg": 1.0}
KINDS = {
    "tarflow": TarFlow(TarFlowConfig(**SHAPE, patch_size=2, channels=256, blocks=2, layers_per_block=2)),
    "itarflow": ITarFlow(
        ITarFlowConfig.from_dict(
            {**SHAPE, "patch_sizes": [2, 4], "channels": [128, 256], "blocks": 2, "layers_per_block": [2, 3]}
        )
    ),
}


def write(directory: Path, kind: str) -> Path:
    flow = KINDS[kind]
    return save_model(directory, parameters(flow), {"model_type": kind, **flow.config.to_dict()})


RUN_AHEAD = 3.5
"""How far above the peak of one operation after the other a prediction may be, as in test_memory.py."""


@pytest.mark.usefixtures("in_mlx", "chosen_here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "guidance"), [(1, 1.0), (3, 0.0), (5, 1.0)])
def test_predicted_peaks(tmp_path, kind, batch, guidance):
    directory = write(tmp_path / "model", kind)
    gc.collect()
    before = mx.get_active_memory()
    pipe = load(directory)
    expected = plan_classes(directory, batch=batch, guidance=guidance).phases()
    settings = pipe.settings.with_classes(denoise_steps=1).updated(method="rolling", guidance=guidance)
    with one_at_a_time():
        taken = pipe.generate("1", seed=1, images=batch, settings=settings).stats.memory
    for phase, predicted in expected.items():
        assert taken[phase] - before <= predicted <= RUN_AHEAD * (taken[phase] - before), phase


@pytest.mark.usefixtures("chosen_here")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_exact(tmp_path, kind):
    directory = write(tmp_path / "model", kind)
    for dtype in ("float32", "float16"):
        held = sum(value.nbytes for _, value in tree_flatten(load(directory, dtype=dtype).flow.parameters()))
        assert plan_classes(directory, dtype=dtype).weights == {"flow": held}
    quantize_model(directory, tmp_path / "small", "8")
    held = sum(value.nbytes for _, value in tree_flatten(load(tmp_path / "small", dtype="float32").flow.parameters()))
    assert plan_classes(tmp_path / "small", dtype="float32").weights == {"flow": held}
    assert plan_classes(directory, dtype="float32", quantization=8).weights == {"flow": held}
    small = load(tmp_path / "small").model
    assert list(class_plans(small)) == ["as stored", "float32", "float16", "8 bit", "6 bit", "4 bit"]
    assert class_plans(small)["float32"].weights == plan_classes(directory, dtype="float32").weights


def test_what_is_no_model_of_classes():
    assert "planned by plan" in message(plan_classes, DEMO)


def test_too_many_pictures_at_once_are_refused(tmp_path, monkeypatch):
    directory = write(tmp_path / "model", "tarflow")
    pipe = load(directory)
    needed = plan_classes(directory, batch=8, guidance=1.0).peak()
    monkeypatch.setattr(limits, "installed", lambda: needed - 1)
    with pytest.raises(StarflowError, match=r"8 pictures at once would take .* GB of memory, .*make fewer"):
        pipe.generate("1", images=20, guidance=1.0)
    words = ["--label", 1, "--images", 20, "--guidance", 1, "-m", directory, "-o", tmp_path / "a.png"]
    assert "make fewer pictures at a time" in generate.mistake(*words)
    monkeypatch.setattr(limits, "installed", lambda: needed)
    pipe.checked_images(pipe.settings.updated(guidance=1.0), (32, 32), 8)


@pytest.mark.parametrize("kind", KINDS)
def test_info_says_what_it_takes(tmp_path, kind):
    directory = write(tmp_path / "model", kind)
    result = info(directory, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    assert "for 4 pictures at once of 32x32" in result.stdout and "low-memory" not in result.stdout
    patches = "256 of 12 numbers, patches of 2" + ("; 64 of 48 numbers, patches of 4" if kind == "itarflow" else "")
    assert patches in result.stdout
    assert ("levels 0.01 to 0.3" if kind == "itarflow" else "0.05") in result.stdout
    for line in ("  flow", "  denoise", "  verify", "  16 GB", "noise"):
        assert any(each.startswith(line) for each in result.stdout.splitlines()), line
    assert info(directory, "--size", "32x32").exit_code == 0
    assert "knows pictures of 32x32 pixels alone" in info.mistake(directory, "--size", "64x64")
    assert "--frames is about videos" in info.mistake(directory, "--frames", 9)
    assert "--chip is for models that make pictures from prompts" in info.mistake(directory, "--chip", "M4")
