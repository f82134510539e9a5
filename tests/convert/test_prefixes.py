"""Checkpoints of other people's trainings: prefixes of names, averaged weights, shards."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import Command
from helpers.golden_files import golden_case
from helpers.paths import DATA

from mlx_starflow.convert import convert_flow, read_checkpoint
from mlx_starflow.convert.archive import write_archive
from mlx_starflow.convert.prefixes import open_flow_tensors
from mlx_starflow.errors import StarflowError

CONFIG = DATA / "t2i/config.yaml"
Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def weights() -> Weights:
    checkpoint = read_checkpoint(golden_case("t2i") / "model.pth")
    return {name: checkpoint.mx(name) for name in checkpoint}


def prefixed(weights: Mapping[str, mx.array], prefix: str, change: Callable[[str], str] = str) -> Weights:
    return {prefix + change(name): array for name, array in weights.items()}


def averages(weights: Mapping[str, mx.array]) -> Weights:
    """Other numbers of the same names."""
    return {name: array + 1 if array.dtype == mx.float32 else array for name, array in weights.items()}


def written(folder: Path, weights: Weights, name: str = "mine.safetensors") -> Path:
    return write_archive(folder / name, weights, weights.items())


def said(path: Path, **options: bool) -> tuple[dict, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = open_flow_tensors(path, **options)
    return found, [str(each.message) for each in caught]


def same(found: Mapping[str, object], weights: Weights) -> bool:
    return found.keys() == weights.keys() and all(
        mx.array_equal(found[name].read(), array) for name, array in weights.items()
    )


def message(path: Path, **options: bool) -> str:
    with pytest.raises(StarflowError) as raised:
        open_flow_tensors(path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "state_dict.model.module."])
def test_known_prefixes_are_taken_off_and_said(weights, tmp_path, prefix, suffix):
    path = written(tmp_path, prefixed(weights, prefix), f"mine{suffix}")
    found, words = said(path)
    assert same(found, weights)
    plain = prefix.replace("_orig_mod.", "")
    off = " and ".join(filter(None, [plain, "_orig_mod." if plain != prefix else ""]))
    assert words == [f"{path}: {off} taken off the tensors' names"]


def test_wrappers_within_names(weights, tmp_path):
    """What FSDP, gradient checkpointing and torch.compile of single blocks leave there."""

    def change(name: str) -> str:
        for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
            name = name.replace("blocks.0.", f"blocks.0.{part}", 1)
        return name

    found, words = said(written(tmp_path, prefixed(weights, "_fsdp_wrapped_module.", change)))
    assert same(found, weights)
    assert "_orig_mod. and _fsdp_wrapped_module. and _checkpoint_wrapped_module. taken off" in words[0]
    flat = {**weights, "blocks.0._fsdp_wrapped_module._flat_param": mx.zeros(3)}
    assert "holds FSDP's flattened parameters" in message(written(tmp_path, flat))
    twice = {**weights, "_orig_mod.var": mx.zeros(3)}
    assert "the tensor var is there twice" in message(written(tmp_path, twice))


def test_an_unknown_prefix_is_named(weights, tmp_path):
    path = written(tmp_path, prefixed(weights, "my_stuff.inner."))
    assert message(path) == (
        f"{path}: the names of its tensors begin with 'my_stuff.inner.', which is no beginning that is known (module, "
        "model, net, network, flow, generator, state_dict, model_state_dict, ema): save the flow's own state_dict()"
    )
    both = {**prefixed(weights, "model."), **prefixed(weights, "net.")}
    assert "holds several flows, under model. and net.:" in message(written(tmp_path, both))


def test_averages_beside_the_weights(weights, tmp_path):
    """As Lightning's callbacks keep them: in one dictionary, and with other networks."""
    other = averages(weights)
    both = {**prefixed(weights, "model."), **prefixed(other, "model_ema.module."), "vae.conv.weight": mx.zeros(3)}
    path = written(tmp_path, both)
    found, words = said(path)
    assert same(found, weights)
    assert words[1] == f"{path}: averaged weights are there too (model_ema.module.): --ema takes them"
    found, words = said(path, ema=True)
    assert same(found, other)
    assert words == [
        f"{path}: model_ema.module. taken off the tensors' names, and {len(weights) + 1} other tensors left out"
    ]
    bare = written(tmp_path, {**weights, **prefixed(other, "ema.")})
    assert same(said(bare)[0], weights) and same(said(bare, ema=True)[0], other)
    assert same(said(written(tmp_path, prefixed(other, "ema.")))[0], other)  # nothing else is there
    assert message(written(tmp_path, weights), ema=True).endswith("holds no averaged weights: leave out --ema")


@pytest.mark.torch
@pytest.mark.parametrize("wrap", [
    lambda average: {"ema": average},
    lambda average: {"model_ema": average},
    lambda average: {"ema": {"decay": 0.999, "module": average}},
    lambda average: {"ema_model": {f"module.{name}": tensor for name, tensor in average.items()}},
])  # fmt: skip
def test_dictionaries_of_averages(weights, tmp_path, wrap):
    torch = pytest.importorskip("torch")
    state = torch.load(golden_case("t2i") / "model.pth", weights_only=True)
    average = {name: tensor + 1 if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
    path = tmp_path / "mine.pth"
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save({"model": state, "optimizer": optimizer, "step": 7, **wrap(average)}, path)
    found, words = said(path)
    assert same(found, weights)
    assert len(words) == 1 and "--ema takes them" in words[0]
    assert same(said(path, ema=True)[0], averages(weights))
    torch.save({"optimizer": optimizer, **wrap(average)}, path)
    assert same(said(path)[0], averages(weights))
    torch.save({"model": state, "optimizer": optimizer}, path)
    assert "holds no averaged weights" in message(path, ema=True)


@pytest.mark.torch
def test_averages_of_sharded_training(weights, tmp_path):
    torch = pytest.importorskip("torch")
    from torch.distributed import checkpoint

    state = torch.load(golden_case("t2i") / "model.pth", weights_only=True)
    average = {name: tensor + 1 if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"model": state, "ema": average}, checkpoint_id=str(tmp_path / "run"), no_dist=True)
    assert same(said(tmp_path / "run")[0], weights) and same(said(tmp_path / "run", ema=True)[0], averages(weights))


@pytest.mark.parametrize("given", ["folder", "index", "no index"])
def test_shards(weights, tmp_path, given):
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    folder = tmp_path / "shards"
    for file, held in parts.items():
        written(folder, {f"module.{name}": weights[name] for name in held}, file)
    index = folder / "model.safetensors.index.json"
    if given != "no index":
        index.write_text(json.dumps({"weight_map": {f"module.{n}": f for f, held in parts.items() for n in held}}))
    source = index if given == "index" else folder
    assert same(said(source)[0], weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = convert_flow(source, CONFIG, tmp_path / "model")
        expected = convert_flow(golden_case("t2i") / "model.pth", CONFIG, tmp_path / "expected")
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    if given == "no index":
        written(folder, {"module.var": mx.zeros(3)}, "more.safetensors")
        assert "the tensor module.var is in two files" in message(folder)
    else:
        (folder / "model-00002-of-00002.safetensors").unlink()
        assert "model-00002-of-00002.safetensors is missing; download it into" in message(source)


def test_the_command(weights, tmp_path):
    path = written(tmp_path, {**prefixed(weights, "model."), **prefixed(averages(weights), "ema.")})
    convert = Command("convert")
    done = convert("flow", path, "--config", CONFIG, "-o", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert "model. taken off the tensors' names" in done.stderr and "--ema takes them" in done.stderr
    done = convert("flow", path, "--config", CONFIG, "-o", tmp_path / "b", "--ema")
    assert done.exit_code == 0, done.output
    one, other = (mx.load(str(tmp_path / part / "model.safetensors")) for part in "ab")
    assert all(mx.array_equal(other[name], one[name] + 1) for name in one)
