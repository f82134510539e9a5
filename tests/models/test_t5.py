"""The T5 encoder against transformers' (arrays in tests/data/t5), and its converter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.golden_files import golden_case

from mlx_starflow.convert.t5 import convert_t5
from mlx_starflow.errors import StarflowError
from mlx_starflow.models.t5 import T5Config, T5Encoder, relative_position_buckets, sanitize

DATA = golden_case("t5")
GOLDEN = {name: np.array(array) for name, array in mx.load(str(DATA / "golden.safetensors")).items()}
IDS, MASK = mx.array(GOLDEN["input_ids"]), mx.array(GOLDEN["attention_mask"])
TINY = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def load_encoder(directory: Path = DATA, dtype: mx.Dtype | None = None) -> T5Encoder:
    encoder = T5Encoder(T5Config.from_dict(json.loads((directory / "config.json").read_text())))
    weights = sanitize(mx.load(str(directory / "model.safetensors")))
    encoder.load_weights([(name, w if dtype is None else w.astype(dtype)) for name, w in weights.items()], strict=True)
    return encoder


def largest_error(actual: mx.array, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(np.array(actual.astype(mx.float32)) - expected).max() / np.abs(expected).max())


def test_last_hidden_state_is_transformers():
    hidden = load_encoder()(IDS, MASK)
    assert hidden.dtype == mx.float32
    assert largest_error(hidden, GOLDEN["last_hidden_state"]) < 1e-5


def test_encode_zeroes_padding_and_nothing_else():
    hidden = load_encoder().encode(IDS, MASK)
    assert largest_error(hidden, GOLDEN["masked"]) < 1e-5
    padding = GOLDEN["attention_mask"] == 0
    assert not np.array(hidden)[padding].any()
    assert np.array(hidden)[~padding].any(axis=-1).all()


def test_padding_does_not_reach_the_tokens():
    encoder = load_encoder()
    length = int(MASK[1].sum())
    alone = encoder(IDS[1:2, :length])
    assert largest_error(alone[0], GOLDEN["masked"][1, :length]) < 1e-5
    other = mx.where(MASK, IDS, 7)
    assert largest_error(encoder.encode(other, MASK.astype(mx.bool_)), GOLDEN["masked"]) < 1e-5


# transformers itself, in the same dtype, is off by 0.030 and 0.0033.
@pytest.mark.parametrize(("dtype", "bound"), [(mx.bfloat16, 0.05), (mx.float16, 0.005)])
def test_half_precision(dtype, bound):
    hidden = load_encoder(dtype=dtype).encode(IDS, MASK)
    assert hidden.dtype == dtype
    assert largest_error(hidden, GOLDEN["masked"]) < bound


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_activations_beyond_float16_do_not_overflow(dtype):
    encoder = load_encoder(dtype=dtype)
    for block in encoder.encoder.block:
        mlp = block.layer[1].DenseReluDense
        mlp.wi_0.weight, mlp.wi_1.weight = mlp.wi_0.weight * 200, mlp.wi_1.weight * 200
    mlp_in = mx.random.normal((1, 4, 64), key=mx.random.key(0)).astype(dtype)
    assert mx.abs(encoder.encoder.block[0].layer[1].DenseReluDense(mlp_in)).max() > 65504
    hidden = encoder(IDS, MASK)
    assert mx.isfinite(hidden).all()
    encoder.set_dtype(mx.float32)
    assert largest_error(hidden, np.array(encoder(IDS, MASK))) < 0.05


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_row_of_padding_only_stays_finite(dtype):
    encoder = load_encoder(dtype=dtype)
    mask = mx.concatenate([mx.zeros_like(MASK[:1]), MASK[1:]])
    assert mx.isfinite(encoder(IDS, mask)).all()
    hidden = encoder.encode(IDS, mask)
    assert not hidden[0].any()
    assert largest_error(hidden[1:], GOLDEN["masked"][1:]) < 0.05


# MLX's CPU backend adds up quantized products in the dtype of the scales: four times a dense layer's error and more.
@pytest.mark.parametrize(("dtype", "bound"), [(mx.float32, 1e-5), (mx.bfloat16, 0.2), (mx.float16, 0.02)])
def test_quantized_is_the_dequantized_encoder(dtype, bound):
    encoder = load_encoder(dtype=dtype)
    linears = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    nn.quantize(encoder, 32, 8, class_predicate=lambda name, _: name in linears or name == "shared")
    dense, weights = load_encoder(), []
    for name, module in encoder.named_modules():
        if name in linears or name == "shared":
            parts = (array.astype(mx.float32) for array in (module.scales, module.biases))
            weight = mx.dequantize(module.weight, *parts, group_size=32, bits=8)
            weights.append((f"{name}.weight", weight))
    dense.load_weights(weights, strict=False)
    hidden = encoder.encode(IDS, MASK)
    assert hidden.dtype == dtype
    assert largest_error(hidden, np.array(dense.encode(IDS, MASK))) < bound


def test_relative_position_buckets():
    buckets = relative_position_buckets(300, 32, 128)
    first = buckets[0]
    assert first[:8].tolist() == [0, *range(17, 24)]
    assert first[[8, 15, 16, 31, 32, 64, 127, 128, 299]].tolist() == [24, 25, 26, 27, 28, 30, 31, 31, 31]
    np.testing.assert_array_equal(buckets.T[0][1:], first[1:] - 16)
    np.testing.assert_array_equal(buckets[5:, 5:], buckets[:-5, :-5])


def test_config_reads_what_hugging_face_writes():
    flan_xl = {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 5120, "d_kv": 64, "d_model": 2048,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 24, "num_heads": 32, "num_layers": 24, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 32128,
    }  # fmt: skip
    config = T5Config.from_dict(flan_xl)
    assert (config.d_model, config.d_kv, config.d_ff, config.num_layers, config.num_heads) == (2048, 64, 5120, 24, 32)
    assert (config.vocab_size, config.feed_forward_proj) == (32128, "gated-gelu")
    assert T5Config.from_dict(config.to_dict()) == config


def test_config_defaults_are_those_of_the_first_t5():
    config = T5Config.from_dict(TINY | {"relative_attention_max_distance": None})
    assert (config.feed_forward_proj, config.relative_attention_max_distance) == ("relu", 128)
    assert (config.relative_attention_num_buckets, config.layer_norm_epsilon, config.pad_token_id) == (32, 1e-6, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "umt5"}, "umt5"),
        ({"feed_forward_proj": "gated-tanh"}, "gated-tanh"),
        ({"d_model": 0}, "d_model"),
        ({"num_layers": None}, "num_layers"),
        ({"num_heads": "4"}, "num_heads"),
        ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(StarflowError, match=message):
        T5Config.from_dict(TINY | change)


def test_config_names_missing_sizes():
    with pytest.raises(StarflowError, match="missing key d_ff, num_heads"):
        T5Config.from_dict({key: value for key, value in TINY.items() if key not in ("d_ff", "num_heads")})


def test_sanitize_drops_by_name_only():
    weights = dict.fromkeys(
        ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight",
         "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "encoder.final_layer_norm.weight",
         "encoder.surprise"], 0
    ) | {"shared.weight": 1}  # fmt: skip
    assert sanitize(weights) == {"shared.weight": 1, "encoder.final_layer_norm.weight": 0, "encoder.surprise": 0}
    assert sanitize({"encoder.embed_tokens.weight": 2}) == {"shared.weight": 2}


@pytest.mark.torch
@pytest.mark.parametrize("feed_forward", ["relu", "gelu", "gated-gelu", "gated-silu"])
def test_every_mlp_is_transformers(feed_forward):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            **TINY,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=20,
            feed_forward_proj=feed_forward,
            # With twice these weights one unit in the embeddings' last place moves what comes out by 8e-5.
            initializer_factor=1.0,
        )
    ).eval()
    ours = T5Encoder(T5Config.from_dict(theirs.config.to_dict()))
    weights = sanitize({name: mx.array(tensor.numpy()) for name, tensor in theirs.state_dict().items()})
    ours.load_weights(list(weights.items()), strict=True)
    ids = np.random.default_rng(0).integers(0, 40, (2, 50))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).last_hidden_state.numpy()
    assert largest_error(ours(mx.array(ids)), expected) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 20), (64, 512), (8, 3), (32, 129)])
def test_buckets_are_transformers(buckets, distance):
    torch = pytest.importorskip("torch")
    attention = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    expected = attention._relative_position_bucket(offset, True, buckets, distance)
    np.testing.assert_array_equal(relative_position_buckets(600, buckets, distance), expected.numpy())


# --- converter ---


def copy_source(directory: Path) -> Path:
    directory.mkdir()
    for name in ("config.json", "spiece.model"):
        shutil.copyfile(DATA / name, directory / name)
    return directory


def whole_checkpoint() -> dict[str, mx.array]:
    """The golden encoder as an encoder-decoder would hold it: duplicates, a decoder and an output layer."""
    weights = mx.load(str(DATA / "model.safetensors"))
    return weights | {
        "encoder.embed_tokens.weight": weights["shared.weight"],
        "decoder.embed_tokens.weight": weights["shared.weight"],
        "decoder.block.0.layer.0.SelfAttention.q.weight": mx.ones((64, 64)),
        "lm_head.weight": mx.ones((1024, 64)),
    }


def test_convert_one_file(tmp_path):
    source = copy_source(tmp_path / "source")
    mx.save_safetensors(str(source / "model.safetensors"), whole_checkpoint())
    out = convert_t5(source, tmp_path / "a" / "out")
    assert out == tmp_path / "a" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "spiece.model"]
    assert (out / "spiece.model").read_bytes() == (DATA / "spiece.model").read_bytes()
    written, expected = mx.load(str(out / "model.safetensors")), mx.load(str(DATA / "model.safetensors"))
    assert written.keys() == expected.keys()
    assert all(mx.array_equal(written[name], expected[name]) for name in expected)
    assert largest_error(load_encoder(out).encode(IDS, MASK), GOLDEN["masked"]) < 1e-5


def test_convert_to_bfloat16_and_again(tmp_path):
    source = copy_source(tmp_path / "source")
    mx.save_safetensors(str(source / "model.safetensors"), whole_checkpoint())
    out = convert_t5(str(source), str(tmp_path / "out"), dtype="bfloat16")
    assert {w.dtype for w in mx.load(str(out / "model.safetensors")).values()} == {mx.bfloat16}
    assert largest_error(load_encoder(out).encode(IDS, MASK), GOLDEN["masked"]) < 0.05
    again = convert_t5(out, tmp_path / "again", dtype=mx.float32)
    assert {w.dtype for w in mx.load(str(again / "model.safetensors")).values()} == {mx.float32}


def write_shards(source: Path) -> None:
    """Three shards; the last, with nothing of the encoder in it, is left out."""
    weights = whole_checkpoint()
    names = sorted(name for name in weights if name.startswith("encoder.") or name == "shared.weight")
    parts = [names[:10], names[10:], sorted(weights.keys() - set(names))]
    shards = {f"model-0000{i + 1}-of-00003.safetensors": part for i, part in enumerate(parts)}
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard, part in list(shards.items())[:2]:
        mx.save_safetensors(str(source / shard), {name: weights[name] for name in part})


def test_convert_shards_without_reading_the_decoder(tmp_path):
    source = copy_source(tmp_path / "source")
    write_shards(source)
    out = convert_t5(source, tmp_path / "out")
    assert largest_error(load_encoder(out).encode(IDS, MASK), GOLDEN["masked"]) < 1e-5


def test_convert_names_a_missing_shard(tmp_path):
    source = copy_source(tmp_path / "source")
    write_shards(source)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StarflowError, match=r"model-00002-of-00003\.safetensors is missing"):
        convert_t5(source, tmp_path / "out")


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_convert_pickled_checkpoint(tmp_path, shards, dtype):
    torch = pytest.importorskip("torch")
    source = copy_source(tmp_path / "source")
    state = {name: torch.tensor(np.array(w)).to(getattr(torch, dtype)) for name, w in whole_checkpoint().items()}
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin")
    else:
        names = sorted(state)
        files = {f"pytorch_model-{i}.bin": names[i::shards] for i in range(shards)}
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, part in files.items():
            torch.save({name: state[name] for name in part}, source / file)
    out = convert_t5(source, tmp_path / "out")
    assert {w.dtype for w in mx.load(str(out / "model.safetensors")).values()} == {getattr(mx, dtype)}
    bound = 1e-5 if dtype == "float32" else 0.05
    assert largest_error(load_encoder(out).encode(IDS, MASK), GOLDEN["masked"]) < bound


@pytest.mark.torch
def test_converted_folder_loads_in_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source = copy_source(tmp_path / "source")
    mx.save_safetensors(str(source / "model.safetensors"), whole_checkpoint())
    theirs = transformers.T5EncoderModel.from_pretrained(convert_t5(source, tmp_path / "out")).eval()
    with torch.no_grad():
        hidden = theirs(torch.tensor(GOLDEN["input_ids"]), torch.tensor(GOLDEN["attention_mask"])).last_hidden_state
    assert largest_error(mx.array(hidden.numpy()), GOLDEN["last_hidden_state"]) < 1e-5


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s, w: w.pop("encoder.block.1.layer.0.SelfAttention.k.weight"), "lacks the tensor encoder.block.1.*k.w"),
        (lambda s, w: w.update({"encoder.surprise": mx.ones(3)}), "encoder.surprise"),
        (lambda s, w: w.update({"shared.weight": mx.ones((1024, 32))}), r"shared.weight has shape \(1024, 32\)"),
        (lambda s, w: edit_json(s / "config.json", num_layers=4), r"lacks the tensor encoder.block.3.*and 8 more"),
        (lambda s, w: edit_json(s / "config.json", vocab_size=900), "1000 tokens"),
        (lambda s, w: (s / "config.json").unlink(), "config.json: No such file"),
        (lambda s, w: (s / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda s, w: (s / "config.json").write_text("[]"), "not an object"),
        (lambda s, w: (s / "spiece.model").unlink(), "spiece.model: No such file"),
        (lambda s, w: w.clear(), "lacks the tensor"),
    ],
)
def test_convert_errors(tmp_path, damage, message):
    source, weights = copy_source(tmp_path / "source"), whole_checkpoint()
    damage(source, weights)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(StarflowError, match=message) as error:
        convert_t5(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_convert_damaged_or_absent_weights(tmp_path):
    source = copy_source(tmp_path / "source")
    with pytest.raises(StarflowError, match="holds no weights"):
        convert_t5(source, tmp_path / "out")
    whole = (DATA / "model.safetensors").read_bytes()
    for size in (0, 100, len(whole) // 2):
        (source / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(StarflowError, match=r"cannot read .*model\.safetensors"):
            convert_t5(source, tmp_path / "out")
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(StarflowError, match="weight_map"):
        convert_t5(source, tmp_path / "out")


def test_convert_argument_mistakes(tmp_path):
    with pytest.raises(StarflowError, match="is not a folder"):
        convert_t5(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(StarflowError, match="own folder"):
        convert_t5(DATA, DATA)
    with pytest.raises(StarflowError, match="'int8' is not one of float32"):
        convert_t5(DATA, tmp_path / "out", dtype="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(StarflowError, match="cannot be written"):
        convert_t5(DATA, tmp_path / "file")
