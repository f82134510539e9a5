"""Official iTARFlow checkpoints to model directories and back."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.golden_files import golden_case
from helpers.paths import DATA

from mlx_starflow import load_flow
from mlx_starflow.convert import convert_flow, export_model, read_checkpoint
from mlx_starflow.errors import StarflowError
from mlx_starflow.models.itarflow import ITarFlow
from mlx_starflow.sampling import denoise, iterate, noise_levels, sample

CASES = ["itarflow", "itarflow_patches", "itarflow_shared"]


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_command_makes_the_flow_that_the_golden_arrays_are_of(case, with_config, golden, tmp_path):
    checkpoint = golden_case(case) / "model.pth"
    more = ["--config", DATA / case / "config.yaml"] if with_config else ["--t1", "0.3"]
    done = Command("convert")("flow", checkpoint, "-o", tmp_path / "model", *more)
    assert done.exit_code == 0, done.output
    flow, golden = load_flow(tmp_path / "model", dtype="float32"), golden(case)
    assert isinstance(flow, ITarFlow) and flow.config == golden.flow.config
    z = flow(golden["x"], golden.get("y"), noise_level=golden["t"]).z
    assert golden.relative_error(z, "z") < 1e-5
    labels, levels = golden.get("y"), noise_levels(0.3, 0.01, 5)
    x = sample(flow, golden["noise"], labels, noise_level=0.3)
    assert golden.error(x, "reverse_t0.3") < 2e-4
    assert golden.relative_error(denoise(flow.at(0.3), golden["x"], labels), "denoised_t0.3") < 1e-3
    clean = iterate(flow, 0.3 * golden["x"], labels, levels, clip=True)
    assert golden.relative_error(clean, "iterated_0.3_to_0.01_in_5_clipped") < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_way_back(case, tmp_path):
    convert_flow(golden_case(case) / "model.pth", DATA / case / "config.yaml", tmp_path / "model")
    back = read_checkpoint(export_model(tmp_path / "model", tmp_path / "back.pth"))
    original = read_checkpoint(golden_case(case) / "model.pth")
    assert set(back) == set(original)
    for name in original:
        assert np.array_equal(np.array(back[name]), np.array(original[name])), name


def test_oldest_names(tmp_path):
    original = read_checkpoint(golden_case("itarflow") / "model.pth")
    weights = {name.replace("head_blocks", "attn_blocks"): mx.array(original[name]) for name in original}
    mx.save_safetensors(str(tmp_path / "old.safetensors"), weights)
    flow = load_flow(convert_flow(tmp_path / "old.safetensors", None, tmp_path / "model", arguments={"t1": 0.5}))
    assert (flow.config.t0, flow.config.t1, flow.config.layers_per_block) == (0.01, 0.5, [1, 1, 2])


@pytest.mark.parametrize("case", CASES)
def test_averages_under_prefixes(case, tmp_path):
    """The layers that blocks share stand beside the blocks, and each block's copies of them within."""
    original = read_checkpoint(golden_case(case) / "model.pth")
    weights = {name: original.mx(name) for name in original}
    average = {name: array + 1 if array.dtype == mx.float32 else array for name, array in weights.items()}
    both = {f"module.{n}": a for n, a in weights.items()} | {f"ema.module.{n}": a for n, a in average.items()}
    path, convert = tmp_path / "mine.safetensors", Command("convert")
    mx.save_safetensors(str(path), both)
    done = convert("flow", path, "--t1", "0.3", "-o", tmp_path / "last")
    assert done.exit_code == 0, done.output
    assert "module. taken off the tensors' names" in done.stderr and "--ema takes them" in done.stderr
    done = convert("flow", path, "--t1", "0.3", "-o", tmp_path / "averaged", "--ema")
    assert done.exit_code == 0, done.output
    convert_flow(golden_case(case) / "model.pth", None, tmp_path / "plain", arguments={"t1": 0.3})
    plain, last, averaged = (
        mx.load(str(tmp_path / name / "model.safetensors")) for name in ("plain", "last", "averaged")
    )
    assert plain.keys() == last.keys() == averaged.keys()
    for name, array in plain.items():
        assert mx.array_equal(last[name], array) and mx.array_equal(averaged[name], array + 1), name


def without(tmp_path: Path, *names: str) -> Path:
    original = read_checkpoint(golden_case("itarflow") / "model.pth")
    mx.save_safetensors(
        str(tmp_path / "part.safetensors"), {n: mx.array(original[n]) for n in original if n not in names}
    )
    return tmp_path / "part.safetensors"


def test_what_a_checkpoint_does_not_say(tmp_path):
    checkpoint = golden_case("itarflow") / "model.pth"
    with pytest.raises(StarflowError, match=r"highest noise level of its training; give it, such as --t1 0\.3"):
        convert_flow(checkpoint, None, tmp_path / "model")
    with pytest.raises(StarflowError, match="no square patches of 5 channels; give --channel-size"):
        convert_flow(checkpoint, None, tmp_path / "model", arguments={"t1": 0.3, "channel_size": 5})
    with pytest.raises(StarflowError, match="noise levels must be 0 < t0 <= t1"):
        convert_flow(checkpoint, None, tmp_path / "model", arguments={"t1": 0.001})
    part = without(tmp_path, "blocks.1.proj_in.weight")
    with pytest.raises(StarflowError, match="not a whole iTARFlow"):
        convert_flow(part, None, tmp_path / "model", arguments={"t1": 0.3})
    part = without(tmp_path, "blocks.1.time_embed.mlp.0.bias")
    with pytest.raises(StarflowError, match=r"lacks the tensor blocks\.1\.time_embed\.mlp\.0\.bias"):
        convert_flow(part, None, tmp_path / "model", arguments={"t1": 0.3})
