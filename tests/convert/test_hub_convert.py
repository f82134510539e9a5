"""`mlx-starflow convert REPO` against a small stand-in for the Hugging Face Hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import mlx.core as mx
import pytest
import yaml
from helpers.golden_files import golden_case
from helpers.model_directories import SPIECE, write_image_model, write_video_model
from helpers.tiny_flows import tiny_flow

from mlx_starflow.convert import convert_release, export_model
from mlx_starflow.convert.archive import write_archive
from mlx_starflow.convert.flow import _tarflow_arguments
from mlx_starflow.convert.official import RELEASES, later_scale, released_arguments
from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.files import Spec, load_weights, read_config
from mlx_starflow.model_dir.hub import find_model
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.tarflow import TarFlowConfig

CHECKPOINT, VIDEO_CHECKPOINT = "starflow_3B_t2i_256x256.pth", "starflow-v_7B_t2v_caus_480p_v3.pth"
FLOW, TEXT, VAE = "apple/starflow", "google/flan-t5-xl", "stabilityai/sd-vae-ft-ema"
TARFLOW, AFHQ = "encoreus/Transformer_Autoregressive_Flow", "afhq_model_2_128_3_1_0.07.pth"
VIDEO, VIDEO_VAE = "apple/starflow-v", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
COMMAND = """
import time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # between tries to reach the Hub
from mlx_starflow.cli import main
main()
"""
PARTS = ("text_encoder", "vae", "flow")


class Hub(http.server.ThreadingHTTPServer):
    """Repositories in folders `root/owner/name`, through the endpoints that huggingface_hub asks.

    Attributes:
        requests: method and path of each request.
        truncate: how many more times a file, by `owner/name/file`, is cut in the middle.
        stall: files that never end; `stalled` is set when one of them has begun.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.truncate: dict[str, int] = {}
        self.stall: set[str] = set()
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """The files that were asked for."""
        return [re.sub(r"/resolve/\w+", "", path)[1:] for method, path in self.requests if method == "GET/file"]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/revision/\w+|/tree/\w+)?", path):
            self.server.requests.append(("GET", path))
            self.describe(self.server.root / found[1], found[1], "/tree/" in path)
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path):
            self.server.requests.append(("GET/file" if body else "HEAD", path))
            self.send(self.server.root / found[1] / found[2], f"{found[1]}/{found[2]}", body)
        else:
            self.fail(404, "EntryNotFound")

    def describe(self, folder: Path, name: str, tree: bool) -> None:
        if not folder.is_dir():
            self.fail(404, "RepoNotFound")
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries: list[dict] | dict = [
            {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": sha(str(f))}
            for f in files
        ]
        if not tree:
            entries = {"id": name, "sha": sha(name), "siblings": [{"rfilename": entry["path"]} for entry in entries]}
        content = json.dumps(entries).encode()
        self.reply(200, {"Content-Type": "application/json", "Content-Length": str(len(content))}, content)

    def send(self, file: Path, name: str, body: bool) -> None:
        if not file.is_file():
            self.fail(404, "EntryNotFound")
            return
        content = file.read_bytes()
        headers = {
            "ETag": f'"{sha(str(file))}"',
            "X-Repo-Commit": sha("/".join(name.split("/")[:2])),
            "Accept-Ranges": "bytes",
        }
        status = 200
        if body and (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            self.server.ranges.append(name)
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        headers["Content-Length"] = str(len(content))
        sent = content if body else b""
        cut = body and (self.server.truncate.get(name, 0) > 0 or name in self.server.stall)
        if cut:
            self.server.truncate[name] = self.server.truncate.get(name, 0) - 1
            sent = content[: len(content) // 2]
        self.reply(status, headers, sent)
        if name in self.server.stall and body:
            self.wfile.flush()
            self.server.stalled.set()
            time.sleep(60)
        if cut:
            self.close_connection = True

    def fail(self, status: int, code: str) -> None:
        self.reply(status, {"X-Error-Code": code, "Content-Length": "0"}, b"")

    def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


def sha(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def write_release(root: Path) -> None:
    """A tiny model as the release would be on the Hub, files that must not be downloaded included."""
    model = write_image_model(root / "model")
    # huggingface_hub writes 10 MB at a time: only a larger file can be resumed.
    flow = load_weights(model) | {"blocks.0.attn_mask": mx.zeros((22, 1 << 20), mx.uint8)}
    write_archive(root / FLOW / CHECKPOINT, {n: Spec(w.shape, w.dtype) for n, w in flow.items()}, flow.items())
    text, vae = root / TEXT, root / VAE
    text.mkdir(parents=True)
    vae.mkdir(parents=True)
    weights = load_weights(model / "text_encoder")
    shards = {
        "model-00001-of-00002.safetensors": weights,
        "model-00002-of-00002.safetensors": {
            "decoder.final_layer_norm.weight": mx.zeros(32),
            "lm_head.weight": mx.zeros(8),
        },
    }
    for name, tensors in shards.items():
        write_archive(text / name, {n: Spec(w.shape, w.dtype) for n, w in tensors.items()}, tensors.items())
    index = {"metadata": {}, "weight_map": {n: name for name, tensors in shards.items() for n in tensors}}
    (text / "model.safetensors.index.json").write_text(json.dumps(index))
    (text / "config.json").write_text((model / "text_encoder/config.json").read_text())
    shutil.copy(SPIECE, text / "spiece.model")
    export_model(model / "vae", vae / "diffusion_pytorch_model.safetensors")
    config = {**read_config(model / "vae"), "_class_name": "AutoencoderKL"}
    del config["model_type"]
    (vae / "config.json").write_text(json.dumps(config))
    write_video_release(root)
    for name in (AFHQ, f"more/{AFHQ}", "afhq_model_2_768_8_8_0.07.pth"):
        (root / TARFLOW / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(golden_case("tarflow") / "model.pth", root / TARFLOW / name)
    for folder, name in (
        (root / FLOW, "README.md"),
        (text, "pytorch_model-00001-of-00002.bin"),
        (text, "tf_model.h5"),
        (vae, "diffusion_pytorch_model.bin"),
        (root / VIDEO_VAE, "model_index.json"),
        (root / TARFLOW, "afhq_256_fid_stats.pth"),
        (root / VIDEO_VAE / "vae", "diffusion_pytorch_model.bin"),
    ):
        (folder / name).write_bytes(b"not to be downloaded")
    write_arguments(root / "tiny.yaml", tiny_flow().config.to_dict() | {"vae": VAE, "img_size": 32})


def write_video_release(root: Path) -> None:
    """The video model's flow in the same repository, and its autoencoder as a folder of a diffusers pipeline's."""
    model = write_video_model(root / "video")
    shutil.copytree(root / "model/text_encoder", model / "text_encoder", dirs_exist_ok=True)
    flow = load_weights(model)
    write_archive(root / FLOW / VIDEO_CHECKPOINT, {n: Spec(w.shape, w.dtype) for n, w in flow.items()}, flow.items())
    vae = root / VIDEO_VAE / "vae"
    vae.mkdir(parents=True)
    export_model(model / "vae", vae / "diffusion_pytorch_model.safetensors")
    config = {**read_config(model / "vae"), "_class_name": "AutoencoderKLWan", "is_residual": True, "patch_size": 2}
    del config["model_type"], config["later_scale"]
    (vae / "config.json").write_text(json.dumps(config))
    side = 16 * read_config(model)["img_size"]
    write_arguments(root / "video.yaml", read_config(model) | {"vae": f"{VIDEO_VAE}:0.6", "img_size": side})


def write_arguments(path: Path, arguments: dict) -> None:
    """A flow's config as an official YAML file, which does not have the width of the text."""
    path.write_text(yaml.safe_dump({"arguments": [{k: v} for k, v in arguments.items() if k != "txt_dim"]}))


NEEDED = [
    f"{FLOW}/{CHECKPOINT}",
    f"{TEXT}/config.json",
    f"{TEXT}/model-00001-of-00002.safetensors",
    f"{TEXT}/model.safetensors.index.json",
    f"{TEXT}/spiece.model",
    f"{VAE}/config.json",
    f"{VAE}/diffusion_pytorch_model.safetensors",
]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_release(root)
    return root


@pytest.fixture
def hub(released) -> Iterator[Hub]:
    server = Hub(released)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def start(hub, tmp_path, released):
    """Starts `mlx-starflow convert` with caches of its own and the stand-in as the Hub."""

    def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        variables = {
            **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "MLX_STARFLOW_CACHE": str(tmp_path / "models"),
            **environment,
        }
        command = [sys.executable, "-c", COMMAND, "convert", *map(str, arguments)]
        if "--config" not in arguments and not any(TARFLOW in str(each) for each in arguments):
            command += ["--config", str(released / "tiny.yaml")]
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture
def run(start):
    def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
        process = start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return run


def assert_model(directory: Path, released: Path, dtype: mx.Dtype = mx.bfloat16, original: str = "model") -> None:
    """The directory holds the tiny model that was released."""
    for part in (".", "vae", "text_encoder"):
        found, expected = load_weights(directory / part), load_weights(released / original / part)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            weight = weight.astype(dtype) if part == "text_encoder" else weight
            assert mx.array_equal(found[name], weight).item(), name


def status(out: str) -> dict[str, bool]:
    """Part by part, whether it was complete already."""
    lines = [line.split(": ") for line in out.splitlines() if line.split(": ")[0] in PARTS]
    return {part: what.startswith("complete") for part, what in lines}


# ---- the whole way


def test_everything(hub, run, released, tmp_path, monkeypatch):
    code, out, err = run(FLOW)
    assert code == 0, err
    model = tmp_path / "models/apple--starflow"
    assert "Apple Machine Learning Research Model License Agreement" in out.splitlines()[0]
    assert status(out) == dict.fromkeys(PARTS, False)
    assert "--model apple/starflow" in out.splitlines()[-1]
    assert sorted(hub.downloads()) == NEEDED
    assert_model(model, released)
    assert not list(model.rglob(".writing"))
    notice = (model / "NOTICE").read_text()
    for words in ("research purposes only", CHECKPOINT, f"{TEXT} (Apache License 2.0)", f"{VAE} (MIT License)"):
        assert words in notice
    config = read_config(model)
    assert config["pipeline"] == {"guidance": 3.6}
    assert config["img_size"] == 4  # 32 pixels, in latents
    assert config["txt_dim"] == 32

    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path / "models"))
    assert find_model(FLOW) == find_model("Apple/STARFlow") == model
    from mlx_starflow import load

    assert load(FLOW).generate("a pizza", seed=1).images[0].size == (8, 8)

    # Again: nothing is downloaded or made.
    hub.requests.clear()
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    code, out, err = run("release", FLOW)
    assert code == 0, err
    assert status(out) == dict.fromkeys(PARTS, True)
    assert not hub.requests
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before

    # With other settings: only the parts they are about are made, from the cache, without a connection.
    code, out, err = run("--quantize", "8", FLOW, HF_HUB_OFFLINE="1")
    assert code == 0, err
    assert status(out) == {"text_encoder": True, "vae": True, "flow": False}
    assert not hub.requests
    assert read_config(model)["quantization"]["bits"] == 8
    assert find_model(FLOW) == model

    # Offline, from the cache, somewhere else.
    code, out, err = run(FLOW, "-o", tmp_path / "out", "--dtype", "float32", HF_HUB_OFFLINE="1")
    assert code == 0, err
    assert not hub.requests
    assert_model(tmp_path / "out", released, mx.float32)
    assert f"--model {tmp_path / 'out'}" in out.splitlines()[-1]


def test_the_video_model(hub, run, released, tmp_path, monkeypatch):
    code, out, err = run(VIDEO, "--config", released / "video.yaml")
    assert code == 0, err
    model = tmp_path / "models/apple--starflow-v"
    assert sorted(name for name in hub.downloads() if not name.startswith(TEXT)) == [
        f"{VIDEO_VAE}/vae/config.json",
        f"{VIDEO_VAE}/vae/diffusion_pytorch_model.safetensors",
        f"{FLOW}/{VIDEO_CHECKPOINT}",
    ]
    assert_model(model, released, original="video")
    assert read_config(model / "vae")["later_scale"] == 0.6
    config = read_config(model)
    assert config["vid_size"] == read_config(released / "video")["vid_size"]
    assert config["img_size"] == read_config(released / "video")["img_size"]
    assert config["pipeline"] == {"guidance": 3.5}
    notice = (model / "NOTICE").read_text()
    words = ("research purposes only", "Apple Machine Learning Research Model", VIDEO_CHECKPOINT)
    for each in (*words, f"The folder vae holds {VIDEO_VAE} (Apache License 2.0)"):
        assert each in notice
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path / "models"))
    assert find_model(VIDEO) == model

    # Again nothing is made; another factor makes the autoencoder anew.
    hub.requests.clear()
    code, out, err = run(VIDEO, "--config", released / "video.yaml")
    assert status(out) == dict.fromkeys(PARTS, True), err
    text = (released / "video.yaml").read_text().replace(":0.6", ":0.8")
    (tmp_path / "other.yaml").write_text(text)
    code, out, err = run(VIDEO, "--config", tmp_path / "other.yaml", HF_HUB_OFFLINE="1")
    assert status(out) == {"text_encoder": True, "vae": False, "flow": False}, err
    assert read_config(model / "vae")["later_scale"] == 0.8
    assert not hub.requests


def test_local_parts_need_no_hub(hub, run, released, tmp_path):
    parts = ["--checkpoint", released / FLOW / CHECKPOINT, "--text-encoder", released / TEXT, "--vae", released / VAE]
    code, _, err = run(FLOW, "-o", tmp_path / "out", *parts, HF_HUB_OFFLINE="1")
    assert code == 0, err
    assert not hub.requests
    assert_model(tmp_path / "out", released)
    notice = (tmp_path / "out/NOTICE").read_text()
    assert "text_encoder holds flan-t5-xl, converted likewise; its own licence applies" in notice
    assert str(tmp_path) not in notice


@pytest.mark.parametrize(
    "words", [(f"{TARFLOW}/{AFHQ}",), ("flow", f"{TARFLOW}/more/{AFHQ}"), ("--dtype", "float32", f"{TARFLOW}/{AFHQ}")]
)
def test_a_checkpoint_on_the_hub(words, hub, run, tmp_path, golden):
    """A TarFlow by its official name: that says patches and noise, and the tensors the rest."""
    code, _, err = run(*words, "-o", tmp_path / "afhq")
    assert code == 0, err
    assert hub.downloads() == [next(word for word in words if TARFLOW in word)]
    flow = load_flow(tmp_path / "afhq", dtype="float32")
    config = flow.config
    assert (config.img_size, config.channel_size, config.patch_size, config.noise_std) == (8, 3, 2, 0.07)
    assert (config.channels, config.blocks, config.layers_per_block, config.num_classes) == (128, 3, 1, 3)
    z = flow(golden("tarflow")["x"], golden("tarflow")["y"]).z
    assert golden("tarflow").relative_error(z, "z") < 1e-5
    assert AFHQ in (tmp_path / "afhq/NOTICE").read_text()


def test_a_checkpoint_on_the_hub_that_cannot_be_used(hub, run, tmp_path):
    def mistake(name: str, *more: str, out: Path = tmp_path / "out", **environment: str) -> str:
        hub.requests.clear()
        code, _, err = run(f"{TARFLOW}/{name}", "-o", out, *more, **environment)
        assert code == 2 and err.splitlines()[-1].startswith("Error: ") and "Traceback" not in err
        assert not (tmp_path / "out").exists()
        return err

    assert f"{TARFLOW} on the Hub has no file afhq.pth" in mistake("afhq.pth")
    assert "afhq_256_fid_stats.pth" in mistake("afhq_256_fid_stats.pth")
    name = "afhq_model_2_768_8_8_0.07.pth"
    assert "holds 3 blocks of 1 layers, 128 wide, and so it is not the model that its name speaks of" in mistake(name)
    code, _, err = run(f"{TARFLOW}/{name}", "-o", tmp_path / "given", "--noise-std", "0.07")
    assert code == 0, err
    assert load_flow(tmp_path / "given").config.noise_std == 0.07
    assert "there is no file" in mistake(AFHQ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    # Where it cannot be written, nothing is downloaded.
    (tmp_path / "file").write_text("")
    mistake(AFHQ, out=tmp_path / "file")
    assert not hub.requests


# ---- what goes wrong


def test_a_killed_run_is_completed(hub, start, run, released, tmp_path, monkeypatch):
    hub.stall.add(f"{FLOW}/{CHECKPOINT}")
    process = start(FLOW)
    assert hub.stalled.wait(timeout=60)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in tmp_path.rglob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path / "models"))
    with pytest.raises(StarflowError, match="mlx-starflow convert apple/starflow"):
        find_model(FLOW)
    model = tmp_path / "models/apple--starflow"
    assert (model / "vae/config.json").is_file()
    with pytest.raises(StarflowError, match=r"holds no config\.json"):
        read_config(model)

    hub.stall.clear()
    hub.requests.clear()
    code, out, err = run(FLOW)
    assert code == 0, err
    assert status(out) == {"text_encoder": True, "vae": True, "flow": False}
    assert hub.downloads() == [f"{FLOW}/{CHECKPOINT}"]
    assert_model(model, released)


def test_a_cut_connection_is_resumed(hub, run, released, tmp_path):
    name = f"{FLOW}/{CHECKPOINT}"
    hub.truncate[name] = 1
    code, _, err = run(FLOW)
    assert code == 0, err
    assert hub.ranges == [name]
    assert_model(tmp_path / "models/apple--starflow", released)


def test_offline_with_nothing_in_the_cache(hub, run, tmp_path):
    code, _, err = run(FLOW, HF_HUB_OFFLINE="1")
    assert code == 2
    assert err.startswith("Error: cannot download google/flan-t5-xl: the Hub cannot be reached")
    assert err.count("\n") == 1
    assert not hub.requests
    assert not (tmp_path / "models").exists()


def test_what_the_hub_does_not_have(released, run, hub, tmp_path):
    shutil.copytree(released, tmp_path / "root", ignore=shutil.ignore_patterns(CHECKPOINT))
    hub.root = tmp_path / "root"
    code, _, err = run(FLOW)
    assert code == 2
    assert f"Error: apple/starflow on the Hub has no file {CHECKPOINT}; give a local copy instead" in err
    assert not (tmp_path / "models/apple--starflow/config.json").exists()
    shutil.rmtree(hub.root / FLOW)
    code, _, err = run(FLOW)
    assert code == 2
    assert "Error: cannot download apple/starflow: the Hub has no such repository" in err
    assert "Traceback" not in err


def test_mistakes(tmp_path):
    def mistake(repository: str, **options: object) -> str:
        with pytest.raises(StarflowError) as error:
            convert_release(repository, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "unknown release 'apple/starfish': it must be apple/starflow, apple/starflow-v;" in mistake("apple/starfish")
    assert "cannot quantize to 5" in mistake(FLOW, quantize=5)
    assert "dtype 'int8' is not one of" in mistake(FLOW, dtype="int8")
    for part in ("checkpoint", "config", "text_encoder", "vae"):
        assert "nowhere does not exist" in mistake(FLOW, **{part: tmp_path / "nowhere"})
    picture, video = tmp_path / CHECKPOINT, tmp_path / VIDEO_CHECKPOINT
    picture.write_bytes(b"")
    video.write_bytes(b"")
    message = mistake(FLOW, checkpoint=video)
    assert "is a video model's; convert it with: mlx-starflow convert apple/starflow-v" in message
    message = mistake(VIDEO, checkpoint=picture)
    assert message.endswith("is a picture model's; convert it with: mlx-starflow convert apple/starflow")
    config = tmp_path / "video.yaml"
    for factor in ("half", "0", "-1", "nan"):
        config.write_text(yaml.safe_dump({"arguments": [{"vid_size": "81:16"}, {"vae": f"{VIDEO_VAE}:{factor}"}]}))
        assert f"must be a number above 0, not '{factor}'" in mistake(VIDEO, config=config)


def test_a_hub_that_always_cuts(hub, run, released, tmp_path):
    """The run ends in one line and leaves nothing that loads; the next one does what is left."""
    name = f"{FLOW}/{CHECKPOINT}"
    hub.truncate[name] = 1000
    code, _, err = run(FLOW)
    assert code == 2
    assert err.splitlines()[-1].startswith("Error: cannot download apple/starflow: ")
    assert "Traceback" not in err
    assert not (tmp_path / "models/apple--starflow/config.json").exists()
    hub.truncate.clear()
    hub.requests.clear()
    code, out, err = run(FLOW)
    assert code == 0, err
    assert hub.downloads() == [name]
    assert status(out) == {"text_encoder": True, "vae": True, "flow": False}
    assert_model(tmp_path / "models/apple--starflow", released)


# ---- the facts


def test_released_arguments():
    arguments = released_arguments(Path("ckpts/starflow_3B_t2i_256x256.pth"))
    config = FlowConfig.from_official({**arguments, "txt_dim": 2048})
    assert config.img_size == 32
    assert config.layers_per_block == [2, 2, 2, 2, 2, 24]
    assert [block.num_heads for block in config.blocks] == [48] * 6
    assert [block.txt_dim for block in config.blocks] == [0, 0, 0, 0, 0, 2048]
    assert config.latent_norm_regularization == 1e-4
    video = released_arguments(Path("starflow-v_7B_t2v_caus_480p_v3.pth"))
    assert FlowConfig.from_official({**video, "txt_dim": 2048}).blocks[-1].channels == 4096
    assert released_arguments(Path("mine.pth")) is None
    assert all(released_arguments(Path(release.checkpoint)) for release in RELEASES.values())
    assert later_scale(RELEASES[VIDEO].vae) == 0.6
    assert later_scale(VIDEO_VAE) == 1.0
    networks = [(official["text"], official["vae"]) for official in (arguments, video)]
    assert [(r.text_encoder, r.vae) for r in RELEASES.values()] == networks


def shapes(img_size: int, patch: int, channels: int, blocks: int, layers: int, classes: int) -> dict[str, Tensor]:
    """Some tensors of a TarFlow, by their shapes alone."""
    width, found = 3 * patch**2, {}
    for block in (f"blocks.{index}" for index in range(blocks)):
        found |= {
            f"{block}.pos_embed": ((img_size // patch) ** 2, channels),
            f"{block}.proj_in.weight": (channels, width),
            f"{block}.proj_out.weight": (2 * width, channels),
            **{f"{block}.attn_blocks.{layer}.mlp.main.0.weight": (4 * channels, channels) for layer in range(layers)},
        }
        if classes:
            found[f"{block}.class_embed"] = (classes, 1, channels)
    return {name: Tensor(shape, mx.float32, lambda: mx.zeros(1)) for name, shape in found.items()}


@pytest.mark.parametrize(
    ("name", "size", "classes", "shape"),
    [
        ("afhq_model_8_768_8_8_0.07", 256, 3, (8, 768, 8, 8, 0.07)),
        ("imagenet_model_4_1024_8_8_0.15", 128, 1000, (4, 1024, 8, 8, 0.15)),
        ("imagenet64_model_2_768_8_8_0.05", 64, 0, (2, 768, 8, 8, 0.05)),
        ("imagenet_model_2_768_8_8_0.05", 64, 1000, (2, 768, 8, 8, 0.05)),
        ("imagenet_model_4_1024_8_8_0.05", 64, 1000, (4, 1024, 8, 8, 0.05)),
    ],
)
def test_the_published_tarflows(name, size, classes, shape):
    patch, channels, blocks, layers, noise = shape
    found = _tarflow_arguments(shapes(size, *shape[:4], classes), {}, Path(f"{name}.pth"))
    config = TarFlowConfig.from_official(found)
    assert (config.img_size, config.channel_size, config.num_classes, config.nvp) == (size, 3, classes, True)
    assert (config.patch_size, config.channels, config.blocks, config.layers_per_block) == (
        patch,
        channels,
        blocks,
        layers,
    )
    assert config.noise_std == noise
