"""Official flow checkpoints to model directories: the golden cases, mistakes, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from helpers.golden_files import golden_case
from helpers.paths import DATA

import mlx_starflow.convert
from mlx_starflow.convert import convert_flow, read_checkpoint
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.models.itarflow import at_noise_level

CASES = sorted(path.parent.name for path in DATA.glob("*/config.yaml"))


def convert(case: str, out: Path, **options: object) -> Path:
    return convert_flow(golden_case(case) / "model.pth", DATA / case / "config.yaml", out, **options)


def forward(directory: Path, golden: object, **options: object) -> mx.array:
    x, y = golden.get("x"), golden.get("y")
    return at_noise_level(load_flow(directory, **options), golden.get("t"))(x, y).z


def arguments(case: str) -> dict[str, object]:
    entries = yaml.safe_load((DATA / case / "config.yaml").read_text())["arguments"]
    return {key: value for entry in entries for key, value in entry.items()}


def write_config(path: Path, values: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump({"arguments": [{key: value} for key, value in values.items()]}))
    return path


def write_weights(path: Path, case: str = "t2i", change: Callable[[dict], object] | None = None) -> Path:
    """A case's tensors as safetensors, changed."""
    checkpoint = read_checkpoint(golden_case(case) / "model.pth")
    weights = {name: checkpoint.mx(name) for name in checkpoint}
    if change is not None:
        change(weights)
    mx.save_safetensors(str(path), weights)
    return path


@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case, tmp_path, golden):
    out = convert(case, tmp_path / "model")
    assert sorted(path.name for path in out.iterdir()) == ["NOTICE", "config.json", "model.safetensors"]
    assert read_config(out)["model_type"] == next(
        (kind for kind in ("tarflow", "itarflow") if case.startswith(kind)), "starflow"
    )
    assert golden(case).relative_error(forward(out, golden(case), dtype="float32"), "z") < 1e-5


def test_only_dead_buffers_are_dropped(tmp_path):
    checkpoint = read_checkpoint(golden_case("t2i") / "model.pth")
    weights = load_weights(convert("t2i", tmp_path))
    dropped = {"var", "feat_rope.freqs_cos", "feat_rope.freqs_sin", *(f"blocks.{i}.attn_mask" for i in range(3))}
    assert set(checkpoint) - set(weights) == dropped
    assert all(np.array_equal(np.array(weights[name]), checkpoint[name]) for name in weights)


def test_a_learned_prior_is_kept(tmp_path):
    weights = load_weights(convert("tarflow_vp", tmp_path))
    assert np.array_equal(np.array(weights["var"]), read_checkpoint(golden_case("tarflow_vp") / "model.pth")["var"])


def test_from_safetensors(tmp_path, golden):
    source = write_weights(tmp_path / "official.safetensors")
    out = convert_flow(str(source), str(DATA / "t2i/config.yaml"), str(tmp_path / "model"))
    assert golden("t2i").relative_error(forward(out, golden("t2i"), dtype="float32"), "z") < 1e-5


@pytest.mark.parametrize("case", ["t2i", "t2i_all_text", "pretrained_lm"])
def test_text_width_comes_from_the_checkpoint(case, tmp_path):
    values = arguments(case)
    width = values.pop("txt_dim")
    config = write_config(tmp_path / "config.yaml", values)
    out = convert_flow(golden_case(case) / "model.pth", config, tmp_path / "model")
    assert read_config(out)["txt_dim"] == width
    assert load_flow(out).config.txt_dim == width


@pytest.mark.parametrize(
    # Largest difference in z, relative to its largest value; the networks are random, so errors grow more than usual.
    ("quantize", "mode", "bound"),
    [
        (8, "affine", 0.01),
        ("8", "affine", 0.01),
        (6, "affine", 0.04),
        (4, "affine", 0.15),
        ("mxfp8", "mxfp8", 0.05),
        ("mxfp4", "mxfp4", 0.2),
        ("nvfp4", "nvfp4", 0.25),
    ],
)
def test_quantized(quantize, mode, bound, tmp_path, golden):
    out = convert("t2i", tmp_path, quantize=quantize)
    assert read_config(out)["quantization"]["mode"] == mode
    assert golden("t2i").relative_error(forward(out, golden("t2i"), dtype="float32"), "z") < bound
    layers = quantized_layers(load_flow(out))
    assert len(layers) == 4 * 4  # four layers of qkv, proj and two of the MLP; the text is 24 wide, less than a group
    assert not any("proj_in" in path or "proj_out" in path for path in layers)
    assert f"quantized ({quantize})" in (out / "NOTICE").read_text()


def test_quantizing_while_writing_is_quantizing_the_module(tmp_path):
    from mlx_starflow.model_dir.quantization import quantize_module
    from mlx_starflow.model_dir.weights import parameters

    flow = load_flow(convert("t2i_modern", tmp_path / "dense"), dtype="float32")
    quantize_module(flow, 8)
    written = load_weights(convert("t2i_modern", tmp_path / "quantized", quantize=8))
    expected = parameters(flow)
    assert written.keys() == expected.keys()
    assert all(mx.array_equal(written[name], expected[name]).item() for name in written)


@pytest.mark.parametrize("quantize", [None, 8])
def test_bfloat16(quantize, tmp_path, golden):
    out = convert("t2i", tmp_path, dtype="bfloat16", quantize=quantize)
    assert {w.dtype for w in load_weights(out).values()} - {mx.uint32} == {mx.bfloat16}
    # Rounded weights, computed in float32.
    assert golden("t2i").relative_error(forward(out, golden("t2i"), dtype="float32"), "z") < 0.015


@pytest.mark.torch
@pytest.mark.parametrize(("stored", "written"), [("bfloat16", mx.bfloat16), ("float64", mx.float32)])
def test_the_checkpoints_dtype(stored, written, tmp_path, golden):
    torch = pytest.importorskip("torch")
    state = torch.load(golden_case("t2i") / "model.pth", weights_only=True)
    torch.save({name: value.to(getattr(torch, stored)) for name, value in state.items()}, tmp_path / "model.pth")
    out = convert_flow(tmp_path / "model.pth", DATA / "t2i/config.yaml", tmp_path / "model")
    assert {w.dtype for w in load_weights(out).values()} == {written}
    bound = 0.015 if stored == "bfloat16" else 1e-5
    assert golden("t2i").relative_error(forward(out, golden("t2i"), dtype="float32"), "z") < bound


def test_notice_names_the_licence(tmp_path):
    notice = (convert("t2i", tmp_path) / "NOTICE").read_text()
    assert "Apple Machine Learning Research Model License Agreement" in notice
    assert "research purposes only" in notice
    assert "LICENSE_MODEL" in notice
    assert "model.pth was converted" in notice


# ---- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.proj_in.bias"), r"lacks the tensor blocks\.1\.proj_in\.bias;"),
        (lambda w: w.update({"blocks.0.surprise": mx.zeros(1)}), r"does not account for: blocks\.0\.surprise"),
        (
            lambda w: w.update({"blocks.2.proj_in.bias": mx.zeros(7)}),
            r"blocks\.2\.proj_in\.bias has shape \(7,\), but its config says \(128,\)",
        ),
        # Not a dead buffer: nothing but the known names is dropped.
        (lambda w: w.update({"blocks.0.freqs_cos": mx.zeros(1)}), r"freqs_cos"),
    ],
)
@pytest.mark.parametrize("quantize", [None, 8])
def test_strict(change, message, quantize, tmp_path):
    source = write_weights(tmp_path / "official.safetensors", change=change)
    with pytest.raises(StarflowError, match=message) as error:
        convert_flow(source, DATA / "t2i/config.yaml", tmp_path / "model", quantize=quantize)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*config.yaml: No such file"),
        ("a: [", "config.yaml is not valid YAML"),
        ("- 1\n- 2", "config.yaml is not an official config"),
        ("just words", "config.yaml is not an official config"),
        ("", "config.yaml is not an official config"),
        ("arguments:\n- img_size: 8\n", "config.yaml: flow config: missing key"),
        ("arguments:\n- channels: many\n- txt_size: 6\n", "config.yaml: "),
        ("arguments:\n- txt_size: lots\n", "config.yaml: "),
    ],
)
def test_bad_configs(content, message, tmp_path):
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(StarflowError, match=message) as error:
        convert_flow(golden_case("t2i") / "model.pth", config, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("t2i", {"channels": 192}, "has shape"),
        ("t2i", {"layers_per_block": "1 1 3"}, "lacks the tensor"),
        ("t2i", {"layers_per_block": "1 1 1"}, "does not account for"),
        ("t2i", {"txt_dim": 32}, "proj_txt.weight has shape"),
        ("t2i", {"vae": "someone/else"}, "unknown vae"),
        ("tarflow", {"num_classes": 4}, "class_embed has shape"),
        ("tarflow", {"blocks": 2}, "does not account for"),
    ],
)
def test_config_of_another_checkpoint(case, changes, message, tmp_path):
    config = write_config(tmp_path / "config.yaml", {**arguments(case), **changes})
    with pytest.raises(StarflowError, match=message):
        convert_flow(golden_case(case) / "model.pth", config, tmp_path / "model")


@pytest.mark.parametrize(("checkpoint", "config"), [("t2i", "tarflow"), ("tarflow", "t2i")])
def test_config_of_another_kind_of_flow(checkpoint, config, tmp_path):
    with pytest.raises(StarflowError):
        convert_flow(golden_case(checkpoint) / "model.pth", DATA / config / "config.yaml", tmp_path)


def test_no_text_in_the_checkpoint(tmp_path):
    values = arguments("t2i")
    values.pop("txt_dim")
    config = write_config(tmp_path / "config.yaml", values)
    source = write_weights(tmp_path / "x.safetensors", change=lambda w: w.pop("blocks.2.proj_txt.weight"))
    with pytest.raises(StarflowError, match=r"has no tensor proj_txt\.weight"):
        convert_flow(source, config, tmp_path / "model")


def test_other_mistakes(tmp_path):
    config = DATA / "t2i/config.yaml"
    with pytest.raises(StarflowError, match="No such file"):
        convert_flow(tmp_path / "nothing.pth", config, tmp_path / "model")
    with pytest.raises(StarflowError, match=r"nothing\.safetensors is missing"):
        convert_flow(tmp_path / "nothing.safetensors", config, tmp_path / "model")
    with pytest.raises(StarflowError, match="own folder"):
        convert("t2i", golden_case("t2i"))
    with pytest.raises(StarflowError, match="dtype 'int8' is not one of"):
        convert("t2i", tmp_path / "model", dtype="int8")
    with pytest.raises(StarflowError, match="cannot quantize to '5'; it must be one of 8, 6, 4"):
        convert("t2i", tmp_path / "model", quantize="5")
    for size in (0, 100, 100_000):
        source = tmp_path / "short.safetensors"
        write_weights(source)
        source.write_bytes(source.read_bytes()[:size])
        with pytest.raises(StarflowError, match=r"cannot read .*short\.safetensors") as error:
            convert_flow(source, config, tmp_path / "model")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def test_output_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StarflowError, match=r"file.* cannot be written"):
        convert("t2i", tmp_path / "file")
    with pytest.raises(StarflowError, match=r"file.* cannot be written"):
        convert("t2i", tmp_path / "file" / "below")
    other = tmp_path / "text_encoder"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(StarflowError, match="holds another model"):
        convert("t2i", other)
    assert [path.name for path in other.iterdir()] == ["config.json"]


def test_output_is_replaced(tmp_path, golden):
    out = convert("t2i_modern", tmp_path / "model")
    (out / "vae").mkdir()
    (out / "mine.txt").write_text("keep")
    convert("t2i", out)
    assert (out / "mine.txt").read_text() == "keep"
    assert golden("t2i").relative_error(forward(out, golden("t2i"), dtype="float32"), "z") < 1e-5


def test_names_are_found_without_importing_converters():
    code = "import sys, mlx_starflow.convert as c; assert 'mlx.core' not in sys.modules; print(c.convert_flow.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "convert_flow"
    assert all(callable(getattr(mlx_starflow.convert, name)) for name in mlx_starflow.convert.__all__)
    with pytest.raises(AttributeError):
        mlx_starflow.convert.nonsense  # noqa: B018


@pytest.mark.parametrize("quantize", [None, 8])
@pytest.mark.parametrize("suffix", [pytest.param(".pth", marks=pytest.mark.torch), ".safetensors"])
def test_memory(suffix, quantize, tmp_path):
    """A checkpoint of many layers is converted in the memory of a few tensors."""
    values = arguments("t2i")
    values["layers_per_block"] = "1 1 60"
    config = write_config(tmp_path / "config.yaml", values)

    def deepen(weights: dict[str, mx.array]) -> None:
        for name in [name for name in weights if name.startswith("blocks.2.attn_blocks.0.")]:
            for layer in range(2, 60):
                weights[name.replace("attn_blocks.0", f"attn_blocks.{layer}")] = weights[name]

    source = write_weights(tmp_path / "deep.safetensors", change=deepen)
    if suffix == ".pth":
        torch = pytest.importorskip("torch")
        state = {name: torch.from_numpy(np.array(w)) for name, w in mx.load(str(source)).items()}
        source = tmp_path / "deep.pth"
        torch.save(state, source)
    total = source.stat().st_size
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = convert_flow(source, config, tmp_path / "model", quantize=quantize)
    assert mx.get_peak_memory() - before < total / 20
    assert len(json.loads((out / "config.json").read_text())["layers_per_block"]) == 3
    shutil.rmtree(tmp_path)
