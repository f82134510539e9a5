"""Predicted memory against what MLX says it held."""

from __future__ import annotations

import gc
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.model_directories import SPIECE, write_image_model
from helpers.peaks import one_at_a_time
from helpers.tiny_flows import tiny_flow
from mlx.utils import tree_flatten

from mlx_starflow import cpu, load
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.hub import DEMO
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.planning.footprint import decode
from mlx_starflow.planning.limits import MemoryRequest, automatic_kv_bits
from mlx_starflow.planning.memory import ModelConfigs, parameter_count, plan, weight_bytes
from mlx_starflow.planning.summary import memory_report

PLAIN = T5Config(vocab_size=1000, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
GATED = T5Config(
    vocab_size=1000, d_model=192, d_kv=64, d_ff=512, num_layers=3, num_heads=3, feed_forward_proj="gated-gelu"
)
SMALL = AutoencoderKLConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8)
DEEP = AutoencoderKLConfig(block_out_channels=(32, 64, 96, 96), layers_per_block=2, norm_num_groups=16)

MODELS = {
    "narrow": ({"channels": 128, "layers_per_block": [1, 2], "txt_size": 24}, PLAIN, SMALL),
    "wide": ({"channels": 384, "layers_per_block": [1, 2], "txt_size": 16}, GATED, SMALL),
    "patches": ({"channels": 256, "layers_per_block": [2, 3], "txt_size": 32, "patch_size": 2}, GATED, DEEP),
}


def write_model(directory: Path, name: str) -> Path:
    changes, text_encoder, vae = MODELS[name]
    values = {"img_size": 16, "channel_size": 4, "patch_size": 1, "use_softplus": True, "use_final_norm": True}
    flow = STARFlow(FlowConfig(**{**values, **changes, "txt_dim": text_encoder.d_model}))
    config = {"model_type": "starflow", **flow.config.to_dict(), "pipeline": {"guidance": 1.0}}
    networks = [(".", flow, config)]
    networks += [("text_encoder", T5Encoder(text_encoder), text_encoder.to_dict())]
    networks += [("vae", AutoencoderKL(vae), vae.to_dict())]
    for folder, network, config in networks:
        save_model(directory / folder, dict(tree_flatten(network.parameters())), config)
    shutil.copy(SPIECE, directory / "text_encoder/spiece.model")
    return directory


RUN_AHEAD = 3.5
"""How far above the peak of one operation after the other a prediction may be: it has room for those begun early."""


def check(directory: str | Path, low_memory: bool, **how) -> None:
    """Generate, and compare each phase's peak with the predicted one, which must be above it, and not far above."""
    gc.collect()
    before = mx.get_active_memory()
    size, batch = how.get("size"), how.get("batch", 1)
    pipe = load(directory, low_memory=low_memory)
    expected = plan(pipe.directory, **how).phases(low_memory)
    with one_at_a_time():
        kv_bits = how.get("kv_bits", 0)
        memory = pipe.generate("a red cat", seed=1, images=batch, size=size, kv_bits=kv_bits).stats.memory
    assert expected.keys() == memory.keys()
    for phase, predicted in expected.items():
        taken = memory[phase] - before
        assert taken <= predicted <= RUN_AHEAD * taken, phase


@pytest.mark.usefixtures("in_mlx", "chosen_here")
@pytest.mark.parametrize(
    ("name", "batch", "low_memory"),
    [("narrow", 3, False), ("narrow", 3, True), ("wide", 1, True), ("patches", 2, True), ("patches", 1, False)],
)
def test_predicted_peaks(tmp_path, name, batch, low_memory):
    check(write_model(tmp_path, name), low_memory, batch=batch)


@pytest.mark.usefixtures("in_mlx", "chosen_here")
@pytest.mark.parametrize("kv_bits", [8, (8, 4), 4])
def test_predicted_peaks_with_quantized_keys_and_values(tmp_path, kv_bits):
    check(write_model(tmp_path, "narrow"), low_memory=True, batch=3, kv_bits=kv_bits)


@pytest.mark.usefixtures("in_mlx", "chosen_here")
def test_predicted_peaks_of_a_quantized_model():
    check("demo", low_memory=True)


@pytest.mark.skipif(not cpu.has_fast_networks(), reason="there is no compiler, or no Linux CPU")
def test_sampling_in_cpp_takes_the_weights_and_the_cache():
    gc.collect()
    before = mx.get_active_memory()
    pipe = load("demo", low_memory=True)
    predicted = plan(pipe.directory)
    taken = max(pipe.generate("a red cat", seed=1).stats.memory["flow"] for _ in range(3)) - before
    assert predicted.weights["flow"] + predicted.kv_cache == pytest.approx(taken, rel=0.1)
    assert taken < predicted.phases(low_memory=True)["flow"]


@pytest.mark.usefixtures("in_mlx", "chosen_here")
def test_predicted_peaks_of_another_size(tmp_path):
    check(write_model(tmp_path, "narrow"), low_memory=True, size=(96, 48))


@pytest.mark.parametrize("width", [16, 32])
def test_predicted_decoding_in_tiles(width):
    config = AutoencoderKLConfig(block_out_channels=(width,) * 4, layers_per_block=1, norm_num_groups=8)
    vae = AutoencoderKL(config)
    z = mx.zeros((1, 48, 48, 4))
    mx.eval(vae.parameters(), z)
    before = mx.get_active_memory()
    with one_at_a_time():
        mx.reset_peak_memory()
        mx.eval(vae.decode(z))
    taken = mx.get_peak_memory() - before
    assert taken <= decode(config, 48, 48, 1, 4) <= 2 * taken


# ---- weights


@pytest.mark.usefixtures("chosen_here")
def test_weights_of_a_quantized_model_are_exact():
    pipe = load("demo", low_memory=False)
    networks = {"text encoder": pipe.text_encoder, "flow": pipe.flow, "autoencoder": pipe.vae}
    assert plan(DEMO, dtype="float32").weights == {
        part: sum(value.nbytes for _, value in tree_flatten(network.parameters())) for part, network in networks.items()
    }


@pytest.mark.parametrize("precision", ["8", "6", "4", "mxfp4"])
def test_weights_at_each_precision_are_exact(precision):
    flow = STARFlow(FlowConfig(16, 4, 1, 128, [1, 2], txt_size=4, txt_dim=64))
    predicted = weight_bytes(flow, precision, mx.float32)
    flow = STARFlow(flow.config)
    quantize_module(flow, precision)
    assert predicted == sum(value.nbytes for _, value in tree_flatten(flow.parameters()))


# ---- the official release


def test_the_official_release():
    configs = ModelConfigs.of_release("apple/starflow")
    counts = {part: parameter_count(network) for part, network in configs.networks().items()}
    assert counts["autoencoder"] == 83_653_863
    assert counts["text encoder"] == 1_223_527_424
    assert 3.85e9 < counts["flow"] < 3.87e9
    assert configs.guidance == 3.6
    dense = plan(configs, dtype="bfloat16")
    # Of the flow norms, the projections of tokens and text and the last norms are float32 in every precision.
    small = 34 * 4 * 3072 + 6 * (5 * 3072 + 8 * 3073 + 3072 + 4) + 2049 * 3072
    wanted = {part: 2 * count for part, count in counts.items()}
    wanted["flow"] += 2 * small
    assert dense.weights == wanted
    # Keys and values of 24 layers, with and without the prompt, 1024 tokens after 128.
    assert dense.kv_cache == 2 * 24 * 2 * (1024 + 128) * 3072 * 2
    assert not dense.fits(8, low_memory=True)
    assert dense.fits(16, low_memory=True) and dense.fits(24)
    assert plan(configs, dtype="float32").fits(24, low_memory=True) and not plan(configs, dtype="float32").fits(16)
    assert plan(configs, dtype="float16", flow_dtype="float32", quantization=6).fits(8, low_memory=True)
    with pytest.raises(StarflowError, match="unknown release 'apple/pear'"):
        ModelConfigs.of_release("apple/pear")


def test_nothing_is_computed():
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    plan(ModelConfigs.of_release("apple/starflow"), quantization={"flow": 4, "text encoder": 8})
    assert mx.get_peak_memory() - before < 2**20


def test_what_makes_it_grow():
    configs = ModelConfigs.of_release("apple/starflow")
    one = plan(configs, dtype="bfloat16")
    assert plan(configs, dtype="bfloat16", guidance=0.0).kv_cache == one.kv_cache // 2
    assert plan(configs, dtype="bfloat16", batch=4).kv_cache == one.kv_cache * 4
    half, quarter = (plan(configs, dtype="bfloat16", size=(1024, 1024), kv_bits=bits) for bits in (8, 4))
    whole = plan(configs, dtype="bfloat16", size=(1024, 1024))
    assert 0.53 < half.kv_cache / whole.kv_cache < 0.55 and 0.28 < quarter.kv_cache / whole.kv_cache < 0.3
    both = plan(configs, dtype="bfloat16", size=(1024, 1024), kv_bits=(8, 4))
    assert both.kv_cache == (half.kv_cache + quarter.kv_cache) // 2
    alone = [plan(configs, dtype="bfloat16", size=(1024, 1024), guidance=0.0, kv_bits=bits) for bits in (8, (8, 4))]
    assert alone[0] == alone[1]
    larger = plan(configs, dtype="bfloat16", size=(512, 256))
    assert larger.kv_cache == one.kv_cache * (2048 + 128) // (1024 + 128)
    assert larger.activations["denoise"] > 2 * one.activations["denoise"]
    assert all(a <= b for a, b in zip(one.phases(True).values(), one.phases().values(), strict=True))


def test_errors(tmp_path):
    configs = ModelConfigs.of_release("apple/starflow")
    with pytest.raises(StarflowError, match="multiples of 8 pixels"):
        plan(configs, size=(100, 100))
    with pytest.raises(StarflowError, match="there is no part vae"):
        plan(configs, quantization={"vae": 8})
    with pytest.raises(StarflowError, match="cannot quantize to 5"):
        plan(configs, quantization=5)
    with pytest.raises(StarflowError, match="holds no config"):
        plan(tmp_path)
    directory = write_image_model(tmp_path / "model")
    (directory / "vae/config.json").write_text("{}")
    with pytest.raises(StarflowError, match=r"vae/config\.json: .*missing key block_out_channels"):
        plan(directory)
    videos = ModelConfigs.of_release("apple/starflow-v")
    with pytest.raises(StarflowError, match="the flow makes images and the autoencoder beside it videos"):
        plan(replace(configs, vae=videos.vae))
    labelled = tiny_flow("tarflow")
    save_model(tmp_path / "labelled", parameters(labelled), {"model_type": "tarflow", **labelled.config.to_dict()})
    with pytest.raises(StarflowError, match="labelled reads no prompts"):
        plan(tmp_path / "labelled")


# ---- loading


def test_low_memory_is_chosen_by_the_plan(tmp_path, monkeypatch):
    directory = write_image_model(tmp_path)
    assert not load(directory).backend.low_memory
    peak = plan(directory).peak()
    for room, low_memory in ((peak, False), (peak - 1, True)):
        monkeypatch.setattr("mlx_starflow.pipelines.loading.available", lambda room=room: room)
        assert load(directory).backend.low_memory == low_memory
        assert ("flow" in load(directory).backend.held) != low_memory
    assert not load(directory, low_memory=False).backend.low_memory


def test_bits_of_keys_and_values_are_chosen_by_the_plan(tmp_path, monkeypatch):
    """The most that there is memory for; what helps most where there is for none."""
    directory = ModelDirectory(write_model(tmp_path, "wide"))
    requests = [MemoryRequest(directory, (256, 256), batch=512, low_memory=True)]
    peaks = [requests[0].peak(bits) for bits in (0, 8, (8, 4), 4)]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
    chosen = ((peaks[0], 0), (peaks[0] - 1, 8), (peaks[1] - 1, (8, 4)), (peaks[2] - 1, 4), (peaks[3] - 1, 4))
    for room, bits in chosen:
        monkeypatch.setattr("mlx_starflow.planning.limits.available", lambda room=room: room)
        assert automatic_kv_bits(requests[0]) == bits
    small = MemoryRequest(directory, (16, 16))  # nothing of it would be quantized
    assert automatic_kv_bits(small) == 0


def test_the_released_video_model_on_a_mac_of_32_gb():
    """81 frames of 848x480: weights in 8 bits, or 4, and keys and values in 8."""
    configs = ModelConfigs.of_release("apple/starflow-v")
    for weights in (8, 4):
        dense, eight = (
            plan(configs, dtype="float16", flow_dtype="float16", quantization=weights, kv_bits=bits) for bits in (0, 8)
        )
        assert not dense.fits(32, low_memory=True) and eight.fits(32, low_memory=True)
        assert eight.kv_cache <= 0.55 * dense.kv_cache
    report = "\n".join(memory_report("apple/starflow-v"))
    assert re.search(r"24 GB( +no){2}( +--kv-bits 4){2} +--kv-bits 8,4\n", report)
    assert re.search(r"32 GB +no +--kv-bits 4( +--kv-bits 8){3}\n", report)
    assert "chosen by itself where memory is short" in report


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_planning_keeps_nothing(tmp_path):
    """Networks that are made only to be looked at draw no weights, and leave no keys of those draws behind."""
    model = write_image_model(tmp_path / "model")

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    plan(model)
    before = resident()
    for side in range(8, 88, 2):
        plan(model, size=(side, 8))
    assert resident() - before < 2 * 2**20  # a plan's keys alone are 170 KiB
