"""A flow split over two processes: the same pictures and videos as one makes, half of its memory, one end for both."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model, write_video_model
from helpers.processes import finish, start
from helpers.tiny_flows import tiny_flow
from mlx.utils import tree_flatten
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.tensor_parallel import files_digest, shard
from mlx_starflow.pipelines import load
from mlx_starflow.training.loop import distributed

HERE = Path(__file__)
FLOWS = {
    "dense": {"head_dim": 16},
    "modern": {
        "channels": 128, "head_dim": 32, "num_kv_heads": 2, "use_swiglu": True, "use_qk_norm": True, "use_bias": False,
        "use_post_norm": True, "norm_type": "rms_norm",
    },
    "affine": {"channels": 128, "head_dim": 32},
    "mxfp8": {"channels": 128, "head_dim": 32, "use_swiglu": True},
}  # fmt: skip
QUANTIZATION = {"affine": 4, "mxfp8": "mxfp8"}
CLI = "from mlx_starflow.cli import main; main()"


def write_models(folder: Path) -> None:
    for name, changes in FLOWS.items():
        directory = write_image_model(folder / name)
        flow = tiny_flow(**changes)
        config = {**json.loads((directory / "config.json").read_text()), **flow.config.to_dict()}
        if name in QUANTIZATION:
            config["quantization"] = quantize_module(flow, QUANTIZATION[name])
        save_model(directory, dict(tree_flatten(flow.parameters())), config)
    write_video_model(folder / "video", head_dim=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def make(folder: Path, group: mx.distributed.Group | None = None) -> dict[str, np.ndarray]:
    """Latents of a picture or video of each model."""
    made = {}
    how = {"dtype": "float32", "group": group}  # the other processes know nothing of `pytest --dtype`
    for name in FLOWS:
        pipe = load(folder / name, **how)
        made[name] = pipe.generate("a cat", seed=3, guidance=1.5, method="sequential").latents
    made["jacobi"] = load(folder / "dense", **how).generate("a cat", seed=3, method="jacobi").latents
    made["video"] = load(folder / "video", **how).generate("a cat", seed=3, frames=9, method="sequential").latents
    return {name: np.array(latents) for name, latents in made.items()}


def command(*arguments: object) -> list[object]:
    return ["-c", CLI, *arguments]


def both(folder: Path, *arguments: object) -> list[tuple[int, str, str]]:
    return finish(start(folder, [command(*arguments, "--tensor-parallel")] * 2))


def test_two_processes_make_what_one_makes(models, tmp_path):
    ended = finish(start(tmp_path, [[HERE, "make", models, tmp_path]] * 2))
    assert [code for code, *_ in ended] == [0, 0], ended
    expected = make(models)
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}.npz")
        assert set(found) == set(expected)
        for name, latents in expected.items():
            assert np.abs(found[name] - latents).max() < 1e-4, name


def test_a_process_reads_its_part_alone(tmp_path):
    flow = tiny_flow(channels=256, head_dim=64, layers_per_block=[2, 6])
    weights = dict(tree_flatten(flow.parameters()))
    save_model(tmp_path / "model", weights, {"model_type": "starflow", **flow.config.to_dict()})
    ended = finish(start(tmp_path, [[HERE, "memory", tmp_path / "model", tmp_path]] * 2))
    assert [code for code, *_ in ended] == [0, 0], ended
    whole, largest = sum(w.nbytes for w in weights.values()), max(w.nbytes for w in weights.values())
    for _, words, _ in ended:
        assert int(words) < 0.52 * whole + 3 * largest


def test_the_command_writes_once(models, tmp_path):
    ended = both(tmp_path, "generate", "a cat", "-m", models / "dense", "--seed", "3", "-o", tmp_path / "two.png")
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "seed 3" in ended[0][1] and ended[1][1:] == ("", "")
    one = Command("generate")("a cat", "-m", models / "dense", "--seed", "3", "-o", tmp_path / "one.png")
    assert one.exit_code == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_video_by_command_from_a_seed_that_is_drawn(models, tmp_path):
    options = ["-m", models / "video", "--frames", "5", "-o", tmp_path / "two.gif"]
    ended = both(tmp_path, "video", "a cat", *options)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "5 frames" in ended[0][1] and "seed" in ended[0][1] and ended[1][1] == ""
    assert Image.open(tmp_path / "two.gif").n_frames == 5


@pytest.mark.slow
def test_a_mistake_ends_both(models, tmp_path):
    """One line each and exit code 2, whichever rank finds it."""
    out = ["-o", tmp_path / "out.png"]
    one_head = write_image_model(tmp_path / "one-head")
    prompt = ["generate", "a cat", "--tensor-parallel"]
    dense, nowhere = ["-m", models / "dense"], tmp_path / "no" / "out.png"
    cases = [
        ([[*prompt, "-m", one_head, *out]] * 2, ["1 attention heads cannot be split into 2 parts"] * 2),
        (
            [[*prompt, "-m", models / name, *out] for name in ("dense", "modern")],
            ["do not have the same files of the model"] * 2,
        ),
        (
            [[*prompt, "-m", models / "dense", *out], [*prompt, "-m", tmp_path / "nothing", *out]],
            ["rank 1 of this run ends", "unknown model"],
        ),
        ([[*prompt, *dense, "-o", nowhere]] * 2, ["does not exist", "rank 0 of this run ends"]),
        ([[*prompt, *dense, *out], ["generate", "a dog", *prompt[2:], *dense, *out]], ["the same prompts"] * 2),
    ]
    for commands, expected in cases:
        ended = finish(start(tmp_path, [command(*arguments) for arguments in commands]))
        for (code, said, words), reason in zip(ended, expected, strict=True):
            assert code == 2 and said == "" and reason in words, (ended, reason)
            assert words.startswith("Error: ") and words.count("\n") == 1, words
    assert not (tmp_path / "out.png").exists()


def test_alone_it_is_a_mistake(models):
    for name in ("generate", "video"):
        message = Command(name).mistake("a cat", "-m", models / "dense", "--tensor-parallel")
        assert f"mlx.launch -n 2 --backend ring -- mlx-starflow {name}" in message


def test_a_dead_process_ends_the_other(models, tmp_path):
    processes = start(tmp_path, [[HERE, "endless", models, tmp_path]] * 2)
    deadline = time.monotonic() + 60
    while not (tmp_path / "1.started").exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    (code, _, words), _ = finish(processes)
    assert code == 2 and "rank 0 ends because another process of this run has ended" in words


class Ranks:
    """As many processes as it says; nothing is sent."""

    def __init__(self, size: int):
        self.size = lambda: size


def test_parts_must_be_whole():
    with pytest.raises(StarflowError, match="4 attention heads cannot be split into 3 parts"):
        shard(tiny_flow(channels=96, head_dim=16, num_heads=4), Ranks(3), "x")
    with pytest.raises(StarflowError, match="2 heads of keys and values cannot"):
        shard(tiny_flow(channels=96, head_dim=16, num_kv_heads=2), Ranks(3), "x")
    with pytest.raises(StarflowError, match="256 hidden numbers of an MLP cannot"):
        shard(tiny_flow(head_dim=16, num_heads=6, num_kv_heads=3), Ranks(3), "x")
    flow = tiny_flow(channels=96, head_dim=16)
    quantize_module(flow, "mxfp8")
    with pytest.raises(StarflowError, match="3 groups of quantized weights cannot be split into 2 parts"):
        shard(flow, Ranks(2), "x")
    assert flow.blocks[0].attn_blocks[0].attention.num_heads == 6, "nothing is done by halves"


def test_what_cannot_be_split(models):
    with pytest.raises(StarflowError, match="use --backend mlx"):
        load(models / "dense", backend="torch", group=mx.distributed.init())
    with pytest.raises(StarflowError, match="fuse them into the model first"):
        load_flow(models / "dense", adapters=[("x", 1.0)], group=mx.distributed.init())


def test_fingerprints(models, tmp_path):
    write_image_model(tmp_path / "a")
    before = files_digest(tmp_path / "a")
    assert before == files_digest(tmp_path / "a") != files_digest(models / "dense")
    data = bytearray((tmp_path / "a/vae/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a/vae/model.safetensors").write_bytes(data)
    assert files_digest(tmp_path / "a") != before


def task(name: str, folder: Path, out: Path) -> None:
    group = distributed.world()
    assert group.size() == 2
    if name == "make":
        np.savez(out / f"{group.rank()}.npz", **make(folder, group))
    elif name == "memory":
        mx.reset_peak_memory()
        load_flow(folder, group=group)
        print(mx.get_peak_memory())
    elif name == "endless":
        with distributed.peers("generate", group, "run the same command again"):
            pipe = load(folder / "dense", group=group)
            (out / f"{group.rank()}.started").write_text("")
            while True:
                pipe.generate("a cat", seed=3)


if __name__ == "__main__":
    try:
        task(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except StarflowError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
