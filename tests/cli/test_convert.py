"""`mlx-starflow convert`, as a user types it."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from helpers.commands import Command
from helpers.golden_files import golden_case
from helpers.paths import DATA

from mlx_starflow.model_dir.directory import load_flow, load_text_encoder, load_vae
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.models.tarflow import TarFlowConfig
from mlx_starflow.sampling import sample

# convert/test_itarflow.py has those of iTARFlow.
CASES = sorted(path.parent.name for path in DATA.glob("*/config.yaml") if not path.parent.name.startswith("itarflow"))


run = Command("convert")
mistake = run.mistake


@pytest.mark.parametrize("case", CASES)
def test_flow(case, tmp_path, golden):
    out = tmp_path / "model"
    result = run("flow", golden_case(case) / "model.pth", "--config", DATA / case / "config.yaml", "-o", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{out}: ")
    assert lines[0].endswith("MB of weights")
    assert "Apple Machine Learning Research Model License Agreement" in lines[1]
    flow = load_flow(out, dtype="float32")
    arrays = golden(case).arrays
    text = golden(case).get("y")
    z = flow(mx.array(arrays["x"]), text).z
    assert golden(case).relative_error(z, "z") < 1e-5
    # The language model's case has no other sample.
    kind, guidance = ("reverse_cfg", (golden(case).get("y_null"), 2.0)) if case == "pretrained_lm" else ("reverse", ())
    assert golden(case).error(sample(flow, golden(case)["noise"], text, *guidance), kind) < 2e-4


def test_flow_options(tmp_path):
    source = [golden_case("t2i") / "model.pth", "--config", DATA / "t2i/config.yaml", "--output", tmp_path]
    assert run("flow", *source, "--quantize", "8", "--dtype", "bfloat16").exit_code == 0
    assert read_config(tmp_path)["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert {w.dtype for w in load_weights(tmp_path).values()} == {mx.uint32, mx.bfloat16}


def test_text_encoder(tmp_path):
    result = run("text-encoder", golden_case("t5"), "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'a'}: 0.")
    encoder, tokenizer = load_text_encoder(tmp_path / "a", dtype="float32")
    arrays = mx.load(str(DATA / "t5/golden.safetensors"))
    hidden = encoder(arrays["input_ids"], arrays["attention_mask"])
    largest = mx.abs(arrays["last_hidden_state"]).max()
    assert (mx.abs(hidden - arrays["last_hidden_state"]).max() / largest).item() < 1e-5
    assert tokenizer.encode("a red apple")
    assert run("text-encoder", golden_case("t5"), "-o", tmp_path / "b", "--quantize", "mxfp8").exit_code == 0
    assert read_config(tmp_path / "b")["quantization"]["mode"] == "mxfp8"


def test_vae(tmp_path):
    result = run("vae", golden_case("sd_vae"), "-o", tmp_path, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "Apple" not in result.output
    assert {w.dtype for w in load_weights(tmp_path).values()} == {mx.bfloat16}
    assert run("vae", golden_case("sd_vae"), "-o", tmp_path).exit_code == 0
    arrays = mx.load(str(DATA / "sd_vae/golden.safetensors"))
    decoded = load_vae(tmp_path, dtype="float32").decode(arrays["latents"].transpose(0, 2, 3, 1))
    assert mx.abs(decoded.transpose(0, 3, 1, 2) - arrays["decoded_raw"]).max().item() < 1e-4


def test_mistakes(tmp_path):
    config = ["--config", DATA / "t2i/config.yaml", "-o", tmp_path / "out"]
    assert "nothing.pth: No such file" in mistake("flow", tmp_path / "nothing.pth", *config)
    assert "lacks the tensor blocks.2.proj_txt.weight" in mistake(
        "flow", golden_case("t2i_patch2") / "model.pth", *config
    )
    assert "is not a folder" in mistake("text-encoder", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert "is not a folder" in mistake("vae", tmp_path / "nowhere", "-o", tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "file is a file; give a folder" in mistake("vae", golden_case("sd_vae"), "-o", tmp_path / "file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["flow"],
        ["release"],
        ["apple/starflow", "--quantize", "5"],
        ["-o", "out"],
        ["flow", "x.pth", "--config", "x.yaml"],
        ["flow", "x.pth", "--config", "x.yaml", "-o", "out", "--quantize", "5"],
        ["vae", "folder", "-o", "out", "--dtype", "int8"],
        ["nonsense"],
    ],
)
def test_usage(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and result.stderr.endswith("--help)\n")


@pytest.mark.parametrize("command", [[], ["release"], ["flow"], ["text-encoder"], ["vae"], ["apple/starflow"]])
def test_help(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


# ---- TarFlows have no YAML: their tensors and their name tell


def write_tarflow(path: Path, case: str = "tarflow") -> Path:
    shutil.copy(golden_case(case) / "model.pth", path)
    return path


def config_of(case: str) -> TarFlowConfig:
    return TarFlowConfig.from_official(yaml.safe_load((DATA / case / "config.yaml").read_text()))


@pytest.mark.parametrize("case", ["tarflow", "tarflow_vp"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("afhq_model_2_128_3_1_0.07.pth", []),
        ("mine.pth", ["--noise-std", "0.07"]),  # three channels, if nothing else is said
        ("mine.pth", ["--noise-std", "0.07", "--channel-size", "3"]),
        ("mine.pth", ["--noise-std", "0.07", "--patch-size", "2"]),
        ("afhq_model_1_128_3_1_0.50.pth", ["--noise-std", "0.07", "--patch-size", "2"]),  # what is said wins
    ],
)
def test_tarflow_without_a_config(case, name, options, tmp_path, golden):
    checkpoint = write_tarflow(tmp_path / name, case)
    result = run("flow", checkpoint, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    flow = load_flow(tmp_path / "out", dtype="float32")
    assert flow.config == config_of(case)
    x, labels = golden(case)["x"], golden(case).get("y")
    assert golden(case).relative_error(flow(x, labels).z, "z") < 1e-5


def test_tarflow_with_every_option(tmp_path):
    options = "--img-size 8 --channel-size 3 --patch-size 2 --channels 128 --blocks 3 --layers-per-block 1"
    options += " --num-classes 3 --noise-std 0.07 --nvp"
    checkpoint = write_tarflow(tmp_path / "mine.pth")
    assert run("flow", checkpoint, "-o", tmp_path / "a", *options.split()).exit_code == 0
    assert load_flow(tmp_path / "a").config == config_of("tarflow")


def test_tarflow_with_a_small_config(tmp_path):
    (tmp_path / "small.yaml").write_text("noise_std: 0.05\ncfg: 1.5\n")
    checkpoint = write_tarflow(tmp_path / "afhq_model_2_128_3_1_0.07.pth")
    source = ["flow", checkpoint, "--config", tmp_path / "small.yaml", "-o", tmp_path / "a"]
    assert run(*source).exit_code == 0
    config = load_flow(tmp_path / "a").config
    assert (config.noise_std, config.cfg, config.patch_size) == (0.05, 1.5, 2)
    assert run(*source, "--noise-std", "0.2").exit_code == 0
    assert load_flow(tmp_path / "a").config.noise_std == 0.2


def test_an_option_instead_of_the_configs(tmp_path):
    source = [golden_case("t2i") / "model.pth", "--config", DATA / "t2i/config.yaml", "-o", tmp_path]
    assert run("flow", *source, "--noise-std", "0.25").exit_code == 0
    assert load_flow(tmp_path).config.noise_std == 0.25


def test_tarflow_mistakes(tmp_path):
    out = ["-o", tmp_path / "out"]
    named = write_tarflow(tmp_path / "afhq_model_2_128_3_1_0.07.pth")
    unnamed = write_tarflow(tmp_path / "mine.pth")
    assert "give it, such as --noise-std 0.07" in mistake("flow", unnamed, *out)
    for option, what in (
        (["--patch-size", "3"], "not 1 channels of 3x3 pixels"),
        (["--channel-size", "4"], "not 4 channels of 1x1 pixels"),
        (["--channel-size", "4", "--patch-size", "2"], "not 4 channels of 2x2 pixels"),
    ):
        assert f"its tokens hold 12 numbers, {what}" in mistake("flow", unnamed, *option, "--noise-std", "0.1", *out)
    for option in ("--patch-size", "--channel-size"):
        assert "must be a whole number of at least 1, not 0" in mistake("flow", unnamed, option, "0", *out)
    # Options that contradict the tensors.
    assert "does not account for: blocks.2." in mistake("flow", named, "--blocks", "2", *out)
    assert "has shape" in mistake("flow", named, "--channels", "256", *out)
    assert "has shape" in mistake("flow", named, "--vp", *out)
    assert "class_embed" in mistake("flow", named, "--num-classes", "0", *out)
    # A STARFlow's arguments do not show in its tensors.
    assert "give the YAML of its arguments (--config YAML)" in mistake("flow", golden_case("t2i") / "model.pth", *out)
    checkpoint = write_tarflow(tmp_path / "starflow_3B_t2i_256x256.pth", "t2i")
    assert "lacks the tensor" in mistake("flow", checkpoint, *out)  # the released arguments are known by this name
    assert not (tmp_path / "out").exists()


# ---- a bare repository


def test_a_bare_repository_is_a_release(tmp_path):
    for arguments in (
        ["apple/starfish", "-o", tmp_path / "out"],
        ["-o", tmp_path / "out", "apple/starfish"],
        ["--quantize", "8", "apple/starfish"],
        ["release", "apple/starfish"],
    ):
        assert "unknown release 'apple/starfish': it must be apple/starflow" in mistake(*arguments)
    assert "there is no command 'flw'" in run("flw", "a/b.pth", "-o", "x").stderr
    assert "nowhere does not exist" in mistake("apple/starflow", "--vae", tmp_path / "nowhere")
