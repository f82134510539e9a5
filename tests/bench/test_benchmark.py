"""What is counted is counted right. Times are never asserted."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.model_directories import write_image_model
from helpers.tiny_flows import tiny_case, tiny_flow

from mlx_starflow.bench.benchmark import ALL_METHODS, bench
from mlx_starflow.bench.contenders import Contender, measure
from mlx_starflow.bench.products import WeightProducts
from mlx_starflow.bench.trials import Task
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import cast_weights, parameters
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.planning.traffic import cache_bytes, evaluation_bytes, evaluation_weights, tokens_at_once
from mlx_starflow.sampling import Certificate, JacobiSettings, RollingSettings, SamplingPlan, SequentialSettings

WIDTH, CHANNELS = 64, 4
LINEAR = 3 * WIDTH * WIDTH + WIDTH * WIDTH + 8 * WIDTH * WIDTH  # of one layer: qkv, proj, two of the MLP
BIASES = 3 * WIDTH + WIDTH + 4 * WIDTH + WIDTH
NORMS = 4 * WIDTH  # two of them
OTHERS = BIASES + NORMS
ENDS = CHANNELS * WIDTH + WIDTH + 2 * CHANNELS * WIDTH + 2 * CHANNELS  # proj_in and proj_out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def measured(model):
    return bench(model, ["a", "b"], rounds=1, size=(8, 16), dtype="float32")


# ---- bytes


def test_weights_of_an_evaluation():
    for block in tiny_flow(layers_per_block=[1, 3]).blocks:
        assert evaluation_bytes(block) == 4 * (block.config.num_layers * (LINEAR + OTHERS) + ENDS)
        layers = 2 * (LINEAR + BIASES) + 4 * NORMS
        assert evaluation_bytes(block, mx.bfloat16) == block.config.num_layers * layers + 4 * ENDS


def test_quantized_weights_count_packed():
    block = tiny_flow().blocks[1]
    quantize_module(block, "8")
    packed = LINEAR + 2 * 4 * LINEAR // 64
    assert evaluation_bytes(block) == packed + 4 * (OTHERS + ENDS)
    assert evaluation_bytes(block, mx.bfloat16) == LINEAR + 2 * 2 * LINEAR // 64 + 2 * BIASES + 4 * (NORMS + ENDS)


def test_conditions_do_not_count(tiny):
    for block in tiny.flow.blocks:
        if not block.is_identity:
            left_out = {name.partition(".")[0] for name in parameters(block).keys() - evaluation_weights(block).keys()}
            assert left_out <= {"sos_embed", "proj_txt", "pos_embed", "class_embed"}


def test_cache():
    config = tiny_flow(layers_per_block=[1, 3]).blocks[1].config
    expected = sum(2 * 3 * 2 * (6 + token) * WIDTH * 2 for token in range(1, 17))
    assert cache_bytes(config, prefix=6, tokens=16, copies=2, item=2) == expected


def test_tokens_at_once():
    assert tokens_at_once(SequentialSettings(), 10) == 1
    assert [tokens_at_once(JacobiSettings(block_size=16), length) for length in (10, 20)] == [10, 16]
    assert [tokens_at_once(RollingSettings(window=64), length) for length in (10, 100)] == [10, 64]


# ---- products


def test_products_are_of_all_layers_and_of_no_condition():
    products = WeightProducts(tiny_case("identity_block").flow, [1, 1, 2], rounds=1)
    assert [len(layers) for layers in products._layers] == [6, 0, 6]
    seconds = products.seconds([1, 1, 4])
    assert seconds[1] == 0 and min(seconds[0], seconds[2]) > 0
    assert products.seconds([1, 1, 4]) is seconds
    assert products.bandwidth == sum(products.bytes) / sum(products.vector_seconds)


def test_products_of_quantized_layers_read_their_rows():
    flow = tiny_flow()
    quantize_module(flow, "8")
    products = WeightProducts(flow, [1, 2], rounds=1)
    layers = products._layers[1]
    assert any(isinstance(layer, nn.QuantizedLinear) for layer in layers)
    assert {products._input(layer, 2, 3).shape for layer in layers} == {
        (2, 3, CHANNELS),
        (2, 3, WIDTH),
        (2, 3, 4 * WIDTH),
    }


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_products_are_in_the_precision_of_each_layer(dtype):
    flow = tiny_flow()
    cast_weights(flow, dtype)
    layers = WeightProducts(flow, [1, 2], rounds=1)._layers[1]
    for layer in layers:
        assert WeightProducts._input(layer, 1, 1).dtype == layer.weight.dtype
    assert {layer.weight.dtype for layer in layers} == {mx.float32, dtype}


# ---- rounds


def test_rounds_go_in_turn():
    order = []

    def contender(name):
        def run():
            order.append(name)
            return mx.zeros(1), [3, 2]

        return Contender(name, "mlx" if name == "a" else "other", run, [SequentialSettings()] * 2, [10, 100])

    lines = []
    found = measure([contender("a"), contender("b")], lambda x: Certificate(0.5, 0.25), 3, lines.append)
    assert "".join(order) == "ab" * 4
    assert [len(one.seconds) for one in found] == [3, 3] and len(lines) == 5
    assert [one.weight_bytes for one in found] == [2 * 10 + 3 * 100] * 2
    assert found[0].peak_memory is not None and found[1].peak_memory is None
    assert sorted(found[0].seconds)[1] == found[0].median


def test_rows_of_guided_blocks():
    tiny = tiny_case("softplus", 3)
    assert Task(tiny.flow, tiny.x, tiny.text, tiny.null_text, 1.5).rows() == [3, 3, 6]
    assert Task(tiny.flow, tiny.x, tiny.text, tiny.null_text, 0.0).rows() == [3, 3, 3]


# ---- the benchmark


def test_counts(measured):
    figures = measured.to_dict()
    assert [one["method"] for one in figures["methods"]] == ["sequential", "jacobi", "rolling"]
    assert figures["pictures"] == 2 and figures["tokens"] == 32 and figures["guidance"] == 1.0
    assert [block["block"] for block in figures["blocks"]] == [1, 0]
    assert [block["rows"] for block in figures["blocks"]] == [4, 2]
    size = 4 * (LINEAR + OTHERS + ENDS)
    sequential, jacobi, rolling = figures["methods"]
    assert sequential["evaluations"] == [32, 32] and sequential["tokens_per_evaluation"] == [1.0, 1.0]
    assert sequential["weight_bytes_per_picture"] == 2 * 32 * size / 2
    assert jacobi["tokens_per_evaluation"] == [32 / count for count in jacobi["evaluations"]]
    assert sum(rolling["evaluations"]) < 64
    for one in figures["methods"]:
        assert len(one["rounds"]) == 1 and one["seconds"] == one["rounds"][0] > 0
        assert one["bandwidth"] == pytest.approx(size * sum(one["evaluations"]) / one["seconds"])
        assert one["share"] == pytest.approx(one["bandwidth"] / figures["matrix_vector_bandwidth"])
        assert one["seconds_over_products"] == pytest.approx(one["seconds"] / one["product_seconds"])
        assert one["peak_memory"] > 2 * size
        assert one["certificate"]["rms"] <= one["certificate"]["max"]
    assert sequential["certificate"]["max"] < 1e-3
    assert figures["ratios"] == {}


def test_without_a_plan_auto_is_the_rolling_window(model, measured):
    assert measured.notes == [
        f"auto is rolling, since this model has no sampling plan: mlx-starflow tune {model} makes one"
    ]
    assert f"Note: {measured.notes[0]}" in measured.lines()
    alone = bench(model, methods=["auto"], rounds=1)
    assert [one.contender.method for one in alone.measured] == ["rolling"] and alone.notes == measured.notes


def test_auto_is_the_plan(tmp_path):
    model = write_image_model(tmp_path)
    SamplingPlan((SequentialSettings(), RollingSettings(window=4)), 1e-2, {}).save(model)
    result = bench(model, methods=["auto", "rolling", "auto"], rounds=1)
    assert [one.contender.method for one in result.measured] == ["rolling", "auto"]
    assert result.measured[1].evaluations[1] == 16 and result.notes == []
    assert result.measured[1].contender.settings[1] == RollingSettings(window=4)


def test_a_tarflow(tmp_path):
    mx.random.seed(0)
    flow = TarFlow(TarFlowConfig(img_size=4, channel_size=1, patch_size=2, channels=64, blocks=2, layers_per_block=1))
    save_model(tmp_path, parameters(flow), {"model_type": "tarflow", **flow.config.to_dict()})
    result = bench(tmp_path, methods=["sequential"], rounds=1)
    assert result.measured[0].evaluations == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["quick"]}, "unknown sampling method 'quick'"),
        ({"methods": []}, "there is no method to time"),
        ({"rounds": 0}, "at least one round"),
        ({"against": "jax"}, "cannot compare with 'jax'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"size": (9, 9)}, "multiples of"),
        ({"guidance": -1.0}, "guidance must be 0 or more"),
    ],
)
def test_mistakes(model, options, message):
    with pytest.raises(StarflowError, match=message) as error:
        bench(model, **options)
    assert "\n" not in str(error.value)


@pytest.mark.torch
def test_against_torch(model):
    result = bench(model, rounds=1, against="torch", dtype="float32")
    figures = {(one["backend"], one["method"]): one for one in result.to_dict()["methods"]}
    assert list(figures)[3:] == [("torch", "sequential"), ("torch", "jacobi")]
    for method in ("sequential", "jacobi"):
        ours, theirs = figures["mlx", method], figures["torch", method]
        for same in ("evaluations", "weight_bytes_per_picture"):
            assert ours[same] == theirs[same]
        assert theirs["certificate"]["max"] == pytest.approx(ours["certificate"]["max"], rel=0.2, abs=1e-5)
        assert theirs["share"] is theirs["product_seconds"] is theirs["peak_memory"] is None
    ratios = result.to_dict()["ratios"]["torch"]
    assert ratios.keys() == set(ALL_METHODS) - {"auto"}
    assert ratios["jacobi"] == figures["torch", "jacobi"]["seconds"] / figures["mlx", "jacobi"]["seconds"]
    assert ratios["rolling"] == figures["torch", "sequential"]["seconds"] / figures["mlx", "rolling"]["seconds"]
    assert result.about["dtype"] == "float32" and result.about["torch"].endswith(", float32")
    assert any(line.startswith("times as fast as torch") and len(line) <= 120 for line in result.lines())


@pytest.mark.torch
def test_torch_alone_is_sequential_too(model):
    result = bench(model, methods=["rolling"], rounds=1, against="torch")
    # In the precision that it chooses for itself, which is said: ours may be another.
    assert result.about["torch"].endswith(", bfloat16" if "CUDA" in result.about["torch"] else ", float32")
    assert [(one.contender.backend, one.contender.method) for one in result.measured] == [
        ("mlx", "rolling"),
        ("torch", "sequential"),
    ]


@pytest.mark.torch
def test_a_dtype_that_the_reference_lacks(model):
    with pytest.raises(StarflowError, match="float32 or bfloat16"):
        bench(model, rounds=1, against="torch", dtype="float16")
