"""Writing model directories: all or nothing, in one file or several."""

from __future__ import annotations

import json
import os

import mlx.core as mx
import pytest
from helpers.commands import message
from helpers.golden_files import golden_case
from helpers.model_directories import config_of, same, save_flow
from helpers.tiny_flows import tiny_flow

from mlx_starflow.convert import convert_t5
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_flow, load_text_encoder
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.model_dir.saving import save_model, save_tensors
from mlx_starflow.model_dir.weights import parameters


def test_round_trip(tmp_path):
    flow = tiny_flow()
    out = save_flow(tmp_path / "deep" / "model", flow)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_flow(str(out), dtype="float32")
    assert same(parameters(loaded), parameters(flow))
    assert loaded.config == flow.config


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8, mx.int32, mx.bool_])
def test_files_are_what_others_read(dtype, tmp_path):
    from safetensors.mlx import load_file

    weights = {
        "odd": mx.arange(3).astype(dtype),
        "scalar": mx.array(1).astype(dtype),
        "empty": mx.zeros((0, 4), dtype),
        "transposed": mx.arange(6).reshape(2, 3).T.astype(dtype),
        "bytes": mx.arange(5).astype(mx.uint8),
        "floats": mx.arange(5).astype(mx.float32),
    }
    save_model(tmp_path, weights, {})
    assert same(load_weights(tmp_path), weights)
    if dtype == mx.bfloat16:
        return  # the other reader goes through NumPy, which has no such type
    read = load_file(tmp_path / "model.safetensors")
    assert same(read, weights)
    assert {name: w.dtype for name, w in read.items()} == {name: w.dtype for name, w in weights.items()}


def test_shards(tmp_path):
    flow = tiny_flow()
    out = save_flow(tmp_path, flow, max_shard_gb=3e-5)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    largest = max(w.nbytes for w in parameters(flow).values())
    assert all((out / shard).stat().st_size < max(30_000, largest) + 5000 for shard in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in parameters(flow).values())
    assert set(index["weight_map"].values()) == set(shards)
    assert same(parameters(load_flow(out, dtype="float32")), parameters(flow))


def test_shards_that_do_not_fit_together(tmp_path):
    out = save_flow(tmp_path, max_shard_gb=3e-5)
    shard = min(out.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert f"cannot read {shard}, download it again" in message(load_flow, out)
    shard.unlink()
    assert f"{shard} is missing" in message(load_flow, out)
    for index in ("{}", '{"weight_map": {"a": 1}}'):
        (out / "model.safetensors.index.json").write_text(index)
        assert "has no weight_map" in message(load_flow, out)


@pytest.mark.parametrize(("first", "second"), [(3e-5, 5), (5, 3e-5), (3e-5, 5e-5)])
def test_saving_again(first, second, tmp_path):
    """Nothing of the old model is left, whatever its files were; other files are not touched."""
    save_flow(tmp_path, max_shard_gb=first)
    for name in ("mine.txt", "model_of_mine.safetensors", "model.safetensors.bak"):
        (tmp_path / name).write_text("keep")
    flow = tiny_flow(channels=128)
    save_flow(tmp_path, flow, max_shard_gb=second)
    assert same(parameters(load_flow(tmp_path, dtype="float32")), parameters(flow))
    shards = sorted(tmp_path.glob("model*.safetensors"))
    single = tmp_path / "model.safetensors" in shards
    assert single == (second == 5)
    assert (tmp_path / "model.safetensors.index.json").exists() != single
    assert (tmp_path / "model_of_mine.safetensors").read_text() == "keep"
    assert not list(tmp_path.glob(".*"))


def test_lazy_weights_of_the_same_directory(tmp_path):
    flow = tiny_flow()
    save_flow(tmp_path, flow)
    save_model(tmp_path, {n: w + 1 for n, w in load_weights(tmp_path).items()}, config_of(flow))
    assert same(load_weights(tmp_path), {name: w + 1 for name, w in parameters(flow).items()})


def test_further_files(tmp_path):
    save_flow(tmp_path, files={"NOTICE": b"whose it is"})
    assert (tmp_path / "NOTICE").read_bytes() == b"whose it is"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("shard_gb", [5, 3e-5])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted(existing, shard_gb, error, tmp_path, monkeypatch):
    """Wherever saving stops, what loads is the old model or the new one (or nothing, where there was none)."""
    old, new = tiny_flow(), tiny_flow()
    new.blocks[0].proj_in.bias = new.blocks[0].proj_in.bias + 1
    replace, outcomes, stop_at = os.replace, [], 0
    while True:
        directory = tmp_path / str(stop_at)
        if existing:
            save_flow(directory, old)
        calls = 0

        def stop(source, target, limit=stop_at):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)
        try:
            save_flow(directory, new, max_shard_gb=shard_gb)
            break
        except KeyboardInterrupt:
            pass
        except StarflowError as failure:
            assert str(failure) == f"cannot write {directory}: No space left on device"
        finally:
            monkeypatch.setattr(os, "replace", replace)
        if stop_at or existing:
            found = parameters(load_flow(directory, dtype="float32"))
            outcomes.append(["old", "new"][same(found, parameters(new))])
            assert outcomes[-1] == "new" or same(found, parameters(old))
            assert not list(directory.glob(".*"))
        else:
            assert not directory.exists()
        stop_at += 1
    assert outcomes == ["old"] * existing + ["new"] * (stop_at - 1)
    assert stop_at >= 3
    assert same(parameters(load_flow(tmp_path / str(stop_at), dtype="float32")), parameters(new))


@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_while_writing_tensors(existing, tmp_path):
    flow = tiny_flow()
    directory = tmp_path / "model"
    if existing:
        save_flow(directory, flow)
    names = parameters(flow)

    def tensors():
        yield from [(name, mx.zeros_like(w)) for name, w in names.items()][:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_tensors(directory, names, tensors(), config_of(flow))
    if existing:
        assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
        assert same(parameters(load_flow(directory, dtype="float32")), names)
    else:
        assert not directory.exists()


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert message(save_flow, tmp_path / "file").startswith(f"cannot write {tmp_path / 'file'}")
    assert message(save_flow, tmp_path / "file" / "below").startswith("cannot write")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in message(save_flow, tmp_path / "model")


def test_another_kind_of_model_is_not_overwritten(tmp_path):
    out = convert_t5(golden_case("t5"), tmp_path / "model")
    assert "holds another model ('t5', not 'starflow'); give another folder" in message(save_flow, out)
    load_text_encoder(out)
    (out / "config.json").write_text("{")
    assert "is not valid JSON" in message(save_flow, out)
