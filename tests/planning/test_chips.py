"""Estimates follow from bytes, operations and published figures."""

import mlx.core as mx
import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model
from helpers.tiny_flows import tiny_flow

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.hub import CACHE_VARIABLE, DEMO
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.t5 import T5Config
from mlx_starflow.planning.chips import (
    CHIPS,
    PHASES,
    Chip,
    Sampling,
    cache_costs,
    decode_cost,
    estimate,
    find_chips,
    matrix_sizes,
    score_costs,
    text_cost,
    time_report,
    weight_costs,
)
from mlx_starflow.planning.memory import ModelConfigs
from mlx_starflow.planning.traffic import evaluation_bytes
from mlx_starflow.sampling import JacobiSettings, RollingSettings, SamplingPlan

info = Command("info")
LARGE = Chip("test", 1000, 1000.0, 1.0, 512)


@pytest.fixture(scope="module")
def release():
    return ModelConfigs.of_release("apple/starflow")


# ---- chips


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("M1", ["M1"]),
        ("apple m2  ultra", ["M2 Ultra"]),
        ("M3 Max", ["M3 Max 30-core", "M3 Max 40-core"]),
        ("m4 max 32-core", ["M4 Max 32-core"]),
        ("M4 Max (40-core)", ["M4 Max 40-core"]),
    ],
)
def test_names(name, found):
    assert [chip.name for chip in find_chips(name)] == found


def test_every_chip_is_found_by_its_name():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert all(find_chips(chip.name) == [chip] for chip in CHIPS)


@pytest.mark.parametrize("name", ["M3 Mega", "", "M", "M3 Max 20-core", "RTX 4090"])
def test_unknown_chips(name):
    with pytest.raises(StarflowError, match=r"unknown chip .* known are M1, M1 Pro"):
        find_chips(name)


@pytest.mark.parametrize(("name", "tflops"), [("M1", 2.6), ("M1 Pro", 5.2), ("M1 Max", 10.4), ("M2", 3.6)])
def test_rates_that_apple_has_published(name, tflops):
    assert find_chips(name)[0].tflops == pytest.approx(tflops, rel=0.03)


def test_the_slower_of_two():
    chip = Chip("test", 10, 100.0, 1.0, 8)
    assert chip.seconds(1e11, 0) == 1.0
    assert chip.seconds(1e11, 2.56e12 * 3) == pytest.approx(3.0)


# ---- costs


def test_weights():
    flow = tiny_flow()
    sizes = matrix_sizes(flow.config)
    assert sizes == [12 * 64 * 64 + 12 * 64] * 2
    sequential = weight_costs(flow, Sampling.sequential(2, 16), 2, mx.bfloat16)
    assert sequential == [
        (16 * evaluation_bytes(flow.blocks[0], mx.bfloat16), 2 * 16 * sizes[0]),
        (16 * evaluation_bytes(flow.blocks[1], mx.bfloat16), 2 * 16 * sizes[0] * 2),
    ]
    windows = weight_costs(flow, Sampling([4, 8.5], [16, 5]), 2, mx.bfloat16)
    assert windows[1] == (8.5 * evaluation_bytes(flow.blocks[1], mx.bfloat16), 2 * 8.5 * sizes[1] * 5 * 2)


def test_caches():
    config = tiny_flow().config
    (data, text), windows = (
        cache_costs(config, 16, sampling, 2, mx.bfloat16)
        for sampling in (Sampling.sequential(2, 16), Sampling([8, 8], [4, 4]))
    )
    assert data == (2 * 64 * 2 * 16 * 17 / 2, 4 * 64 * 16 * 17 / 2)
    assert text == (2 * 2 * 64 * 2 * sum(6 + token for token in range(1, 17)), 2 * 4 * 64 * 16 * (6 + 8.5))
    assert windows[0][0] == data[0] / 2 and windows[0][1] == data[1] * 2


def test_quantized_weights_are_fewer_bytes_for_as_many_operations():
    flow, quantized = tiny_flow(), tiny_flow()
    quantize_module(quantized, "8")
    dense, packed = (weight_costs(each, Sampling.sequential(2, 16), 1, mx.bfloat16) for each in (flow, quantized))
    assert all(small[0] < 0.6 * large[0] and small[1] == large[1] for small, large in zip(packed, dense, strict=True))


def test_the_score_step():
    flow = tiny_flow()
    data, text = score_costs(flow, 16, mx.float32)
    assert data == (
        3 * evaluation_bytes(flow.blocks[0]),
        6 * matrix_sizes(flow.config)[0] * 16 + 4 * 4 * 64 * 16**2,
    )
    assert text[1] == 6 * matrix_sizes(flow.config)[1] * 22 + 4 * 4 * 64 * 22**2


def test_text_encoder_and_decoder():
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    size = 4 * 32 * 32 + 2 * 32 * 64  # at least: norms and the position bias come on top
    moved, operations = text_cost(config, 6, 4 * 10_000, mx.float32)
    assert moved == 4 * (10_000 - 3200)
    assert 2 * size * 12 <= operations <= 2.1 * (size + 1000) * 12
    vae = AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    small, large = (decode_cost(vae, side, side, 1)[1] for side in (4, 8))
    assert 4 <= large / small < 16


# ---- reports


def test_the_release_on_a_chip(release):
    (chip,) = find_chips("M3 Max 40-core")
    phases = estimate(release, chip)["float16"]
    # 3.86 G weights of 2 bytes, but for the text's projection and 6 start tokens, 1024 times, at 400 GB/s.
    # Norms and the projections of tokens and affine parameters take 4.
    small = 34 * 4 * 3072 + 6 * (5 * 3072 + 8 * 3073 + 3072)
    assert phases["weights"] == pytest.approx(1024 * 2 * (3858.28e6 - 2049 * 3072 + small) / 400e9, rel=1e-6)
    positions = 1024 * 1025 / 2
    cached = 2 * 2 * 3072 * (10 * positions + 2 * 24 * (positions + 1024 * 128))
    assert phases["KV cache"] == pytest.approx(cached / 400e9)
    assert phases.keys() == PHASES.keys() - {"plan", "picture with plan"}
    assert phases["picture"] == pytest.approx(sum(list(phases.values())) - phases["picture"])


def test_only_what_fits(release):
    fitting = {chip.name: list(estimate(release, chip)) for chip in (find_chips("M1") + find_chips("M2 Ultra"))}
    assert fitting["M1"] == ["float16", "8 bit", "6 bit", "4 bit"]
    assert fitting["M2 Ultra"] == ["float32", *fitting["M1"]]
    assert time_report(release, Chip("tiny", 1, 1.0, 1.0, 1))[-1] == "No precision fits."


def test_bytes_decide_at_low_bandwidth(release):
    slow, fast = (
        estimate(release, Chip("test", 10**6, bandwidth, 1.0, 512))["8 bit"]["picture"] for bandwidth in (1.0, 2.0)
    )
    assert slow == pytest.approx(2 * fast, rel=1e-3)


def test_larger_pictures_take_longer(release):
    small, large = (estimate(release, LARGE, size)["4 bit"] for size in (None, (512, 512)))
    assert large["weights"] == pytest.approx(4 * small["weights"])
    assert 4 < large["KV cache"] / small["KV cache"] < 16
    with pytest.raises(StarflowError, match="multiples of 8"):
        estimate(release, LARGE, (100, 100))
    with pytest.raises(StarflowError, match="and this one makes videos"):
        estimate(ModelConfigs.of_release("apple/starflow-v"), LARGE)


def test_a_plan(tmp_path):
    model = write_image_model(tmp_path)
    blocks = (JacobiSettings(block_size=4), RollingSettings(window=8))
    SamplingPlan(blocks, 1e-2, {"evaluations": [4.0, 8.0]}).save(model)
    configs = ModelConfigs.read(model)
    phases = estimate(configs, LARGE)["float32"]
    expected = [
        cost
        for costs in (
            weight_costs(tiny_flow(), Sampling([8.0, 4.0], [4, 8]), 2, mx.float32),
            cache_costs(configs.flow, 16, Sampling([8.0, 4.0], [4, 8]), 2, mx.float32),
        )
        for cost in costs
    ]
    assert phases["plan"] == pytest.approx(sum(LARGE.seconds(*cost) for cost in expected))
    assert "sampling with the plan" in "\n".join(time_report(configs, LARGE))
    SamplingPlan(blocks, 1e-2, {}).save(model)
    assert "plan" not in estimate(configs, LARGE)["float32"]


def test_as_stored():
    (chip,) = find_chips("M1")
    figures = estimate(ModelConfigs.read(DEMO), chip)
    assert next(iter(figures)) == "as stored"
    assert figures["as stored"]["weights"] == pytest.approx(figures["8 bit"]["weights"], rel=0.01)


# ---- the command


def test_info_needs_no_download(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    result = info("apple/starflow", "--chip", "M3 Max")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Estimate, not measured") == 2
    assert "on M3 Max 30-core" in result.stdout and "on M3 Max 40-core" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_info_without_a_chip(tmp_path):
    assert "Estimate" not in info(write_image_model(tmp_path)).stdout


def test_mistakes(tmp_path):
    message = info.mistake("apple/starflow", "--chip", "M9")
    assert "unknown chip 'M9'; known are M1, M1 Pro, M1 Max" in message
    flow = tiny_flow()
    save_model(tmp_path, parameters(flow), {"model_type": "starflow", **flow.config.to_dict()})
    assert "--chip is for models that make pictures from prompts" in info.mistake(tmp_path, "--chip", "M4")
