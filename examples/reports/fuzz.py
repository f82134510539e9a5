"""Damaged and hostile files for every reader of the package: what becomes of each of them?

    python examples/reports/fuzz.py [--mutations 10000] [--seed 0] [--only READER]

A mutation is a good file (of tests/data) with some bytes changed, cut out, repeated or put in, or with values of its
JSON or YAML replaced by others of any type, left out, or nested. Mutation n is the same whenever the seed is. Each is
read in a worker process that has a time limit and 4 GB of memory. What may become of it:

    read        it was still good, or a reader took what it could
    refused     StarflowError, in one line
    error       any other exception: a fault
    crash       the worker ended: a fault
    hang        it took longer than the limit: a fault
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GOOD = Path(__file__).parents[2] / "tests/data/written_before"
LIMIT = 20.0
"""Seconds for a mutation."""

MEMORY = 4 << 30
"""Bytes of address space beyond what a worker has at its start."""

RESULTS = ("read", "refused", "error", "crash", "hang")

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 64.0, 1e-4, 1.5, -0.0, 1e308, 10**9, 2**31, 2**63, 10**30, 10**400, float("nan"),
    float("inf"), "", "x", "1e-4", "64.0", "-1", "a" * 300, "../x", "/dev/zero", "/etc/passwd", "\x00", "\udcff", "é",
    [], [[]], [0], ["x"], [1, 2, 3], [None], {}, {"a": 1}, {"": {}}, [1e308] * 3, [[[[1]]]],
]  # fmt: skip


class Reader(NamedTuple):
    """What reads one kind of file.

    Attributes:
        file: the good file.
        read: reads the mutated one; it lies in a copy of the good one's folder, under the same name.
        structured: it is JSON or YAML (or lines of JSON), whose values can be mutated too.
        folder: what is copied: the file's folder, so many levels up; None: the file alone.
    """

    file: str
    read: Callable[[Path], object]
    structured: str = ""
    levels: int | None = None


# ---- readers


def _network(kind: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        from mlx_starflow.model_dir.directory import NetworkDirectory

        found = getattr(NetworkDirectory, kind)(path.parent)
        return found.new(), found.quantization

    return read


def _weights(path: Path) -> object:
    import mlx.core as mx

    from mlx_starflow.model_dir.directory import ModelDirectory

    network = ModelDirectory(path.parent).load_flow("float32")
    return mx.eval(network.parameters())


def _index(path: Path) -> object:
    from mlx_starflow.model_dir.files import load_weights

    return load_weights(path.parent)


def _official(path: Path) -> object:
    from mlx_starflow.convert.flow import read_arguments
    from mlx_starflow.models.starflow import FlowConfig

    return FlowConfig.from_official(read_arguments(path, path))


def _new_config(path: Path) -> object:
    from mlx_starflow.training.recipes.new_flow import read_flow_config

    return read_flow_config(path)


def _options(path: Path) -> object:
    from mlx_starflow.cli.commands.finetune import finetune
    from mlx_starflow.cli.options.config_file import read_options

    return read_options(path, finetune)


def _pth(path: Path) -> object:
    from mlx_starflow.convert.pth import read_checkpoint

    checkpoint = read_checkpoint(path)
    return [checkpoint.mx(name) for name in checkpoint]


def _plan(path: Path) -> object:
    from mlx_starflow.sampling.methods import SamplingPlan

    return SamplingPlan.find(path.parent)


def _statistics(path: Path) -> object:
    from mlx_starflow.likelihood.calibration import CalibrationStatistics

    return CalibrationStatistics.find(path.parent)


def _adapter(path: Path) -> object:
    from mlx_starflow.model_dir.adapters import Adapter

    return Adapter.read(path.parent)


def _metadata(path: Path) -> object:
    from mlx_starflow.media.metadata import read_metadata

    return read_metadata(path)


def _recipe(path: Path) -> object:
    from PIL import Image, PngImagePlugin

    from mlx_starflow.media.formats import METADATA_KEY
    from mlx_starflow.pipelines.recipes import Recipe

    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, path.read_bytes().decode("latin-1"))
    picture = path.with_suffix(".png")
    Image.new("RGB", (1, 1)).save(picture, pnginfo=info)
    return Recipe.read(picture, video=True)


def _noise(path: Path) -> object:
    from mlx_starflow.media.noise import read_noise

    return read_noise(path)


def _encoded(path: Path) -> object:
    from mlx_starflow.editing.inversion import Encoded

    return Encoded.load(path)


def _picture(path: Path) -> object:
    from mlx_starflow.media.image_files import read_image

    return read_image(path)


def _video(path: Path) -> object:
    from mlx_starflow.media.videos import read_video

    return list(read_video(path))


def _data(path: Path) -> object:
    from mlx_starflow.media.sources import open_source

    return list(open_source(path.parent))


def _cache(path: Path) -> object:
    from mlx_starflow.training.data.cache.reading import LatentCache

    cache = LatentCache(path.parent)
    cache.check()
    return [
        cache.text(captions[:1], cache.ratios[bucket])
        for captions, bucket in zip(cache.captions, cache.buckets, strict=True)
    ]


def _checkpoint(path: Path) -> object:
    from mlx_starflow.training.loop.checkpoint import load_checkpoint

    return load_checkpoint(path)


def _tokenizer(path: Path) -> object:
    from mlx_starflow.models.tokenizer import Tokenizer

    return Tokenizer(path).encode("a red apple")


READERS = {
    "safetensors": Reader("model/model.safetensors", _weights, levels=0),
    "index": Reader("made/model.safetensors.index.json", _index, "json", 0),
    "flow config": Reader("model/config.json", _network("flow"), "json", 0),
    "video flow config": Reader("video-model/config.json", _network("flow"), "json", 0),
    "TarFlow config": Reader("made/tarflow/config.json", _network("flow"), "json", 0),
    "iTARFlow config": Reader("made/itarflow/config.json", _network("flow"), "json", 0),
    "T5 config": Reader("model/text_encoder/config.json", _network("text_encoder"), "json", 0),
    "VAE config": Reader("model/vae/config.json", _network("vae"), "json", 0),
    "video VAE config": Reader("video-model/vae/config.json", _network("vae"), "json", 0),
    "tokenizer": Reader("model/text_encoder/spiece.model", _tokenizer),
    "official YAML": Reader("made/official.yaml", _official, "yaml"),
    "flow YAML": Reader("flow.yaml", _new_config, "yaml"),
    "options": Reader("finetune/config.yaml", _options, "yaml"),
    "pth": Reader("made/model.pth", _pth),
    "plan": Reader("model/sampling_plan.json", _plan, "json"),
    "statistics": Reader("model/likelihood.json", _statistics, "json", 0),
    "adapter": Reader("adapter/adapter_config.json", _adapter, "json", 0),
    "adapter weights": Reader("adapter/adapters.safetensors", _adapter, levels=0),
    "PNG metadata": Reader("picture.png", _metadata),
    "JPEG metadata": Reader("made/a.jpg", _metadata),
    "GIF metadata": Reader("video.gif", _metadata),
    "WebP metadata": Reader("video.webp", _metadata),
    "recipe": Reader("made/recipe.json", _recipe, "json"),
    "noise": Reader("noise.safetensors", _noise),
    "encoded": Reader("encoded.safetensors", _encoded),
    "jsonl": Reader("pictures/metadata.jsonl", _data, "jsonl", 0),
    "csv": Reader("made/table/metadata.csv", _data, levels=0),
    "caption": Reader("made/captions/a.txt", _data, levels=0),
    "PNG": Reader("picture.png", _picture),
    "JPEG": Reader("made/a.jpg", _picture),
    "WebP": Reader("video.webp", _picture),
    "TIFF": Reader("made/a.tif", _picture),
    "BMP": Reader("made/a.bmp", _picture),
    "GIF video": Reader("video.gif", _video),
    "WebP video": Reader("video.webp", _video),
    "cache manifest": Reader("cache/cache.json", _cache, "json", 0),
    "cache index": Reader("cache/index.jsonl", _cache, "jsonl", 0),
    "training checkpoint": Reader("train/training/flow/checkpoint-00000002.safetensors", _checkpoint),
}


def make_good(folder: Path) -> None:
    """The good files, and those of kinds that tests/data has not."""
    import mlx.core as mx
    from PIL import Image

    from mlx_starflow.convert.archive import write_archive
    from mlx_starflow.convert.official import ARGUMENTS
    from mlx_starflow.media.images import save_image
    from mlx_starflow.media.metadata import read_metadata
    from mlx_starflow.model_dir.files import Spec

    shutil.copytree(GOOD, folder, dirs_exist_ok=True)
    made = folder / "made"
    for name in ("tarflow", "itarflow", "table", "captions"):
        (made / name).mkdir(parents=True)
    weights = mx.load(str(folder / "adapter/adapters.safetensors"))
    mx.save_safetensors(str(made / "a.safetensors"), weights)
    (made / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "a.safetensors")})
    )
    layout = {name: Spec(array.shape, array.dtype) for name, array in weights.items()}
    write_archive(made / "model.pth", layout, weights.items())
    official = {**ARGUMENTS["starflow-v_7B_t2v_caus_480p"], "txt_dim": 64, "top_block": {"expansion": 4}}
    lines = [f"- {key}: {json.dumps(value)}\n" for key, value in official.items()]
    (made / "official.yaml").write_text("arguments:\n" + "".join(lines))
    (made / "itarflow/config.json").write_text(
        json.dumps(
            {
                "model_type": "itarflow", "img_size": 8, "channel_size": 3, "patch_sizes": [2, 4],
                "channels": [32], "blocks": 2, "layers_per_block": [1, 2], "head_dim": 16, "num_classes": 3,
                "shared_backbone_layers": 1, "t0": 0.01, "t1": 0.3, "nvp": True, "cfg": 0.0,
            }
        )
    )  # fmt: skip
    (made / "tarflow/config.json").write_text(
        json.dumps(
            {
                "model_type": "tarflow", "img_size": 8, "channel_size": 3, "patch_size": 2, "channels": 32, "blocks": 2,
                "layers_per_block": 1, "head_dim": 16, "num_classes": 3, "noise_std": 0.05, "nvp": True, "cfg": 0.0,
            }
        )
    )  # fmt: skip
    recipe = read_metadata(folder / "video.webp")
    (made / "recipe.json").write_text(json.dumps(recipe))
    picture = Image.open(folder / "picture.png").convert("RGB")
    save_image(picture, made / "a.jpg", recipe)
    for place in ("a.tif", "a.bmp", "captions/a.png", "table/a.png"):
        picture.save(made / place)
    (made / "captions/a.txt").write_text("a red apple\n")
    (made / "table/metadata.csv").write_text('file_name,text\na.png,"a red, round apple"\n')


# ---- mutations


def mutate_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, cut out, repeated, put in, or the end cut off; the head, which says most, more often."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        end = len(data) if rng.integers(2) else min(len(data), 600)
        at, length = int(rng.integers(0, max(end, 1))), int(2 ** rng.integers(0, 8))
        kind = int(rng.integers(6))
        if kind == 0 and data:
            data[min(at, len(data) - 1)] = int(rng.choice([0, 1, 127, 128, 255, rng.integers(256)]))
        elif kind == 1:
            data[at : at + length] = b""
        elif kind == 2:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 4))
        elif kind == 3:
            data[at : at + length] = rng.bytes(length)
        elif kind == 4:
            data[at : at + 8] = int(rng.choice([0, 2**31, 2**62, len(data)])).to_bytes(
                8, str(rng.choice(["little", "big"]))
            )
        elif rng.integers(8) == 0:
            data = data[:at]
    return bytes(data)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found, todo = [], [value]
    while todo:
        one = todo.pop()
        inside = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in inside]
        todo += [one[key] for key in inside]
    return found


def mutate_value(value: Any, rng: np.random.Generator) -> Any:
    """JSON's values with some of them replaced, left out, renamed or nested."""
    value = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 4))):
        places = _places(value)
        if not places or rng.integers(30) == 0:
            return ODD[rng.integers(len(ODD))]
        container, key = places[rng.integers(len(places))]
        kind = int(rng.integers(8))
        if kind < 5:
            container[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
        elif kind == 5:
            del container[key]
        elif kind == 6 and isinstance(container, dict):
            container[str(ODD[rng.integers(len(ODD))])[:50]] = container.pop(key)
        else:
            for _ in range(int(rng.choice([1, 3, 2000]))):
                container[key] = [container[key]]
    return value


def _dump(value: Any) -> str:
    """JSON, also of what is nested a thousand times."""
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    if isinstance(value, dict):
        text = "{" + ",".join(f"{json.dumps(str(key))}:{_dump(each)}" for key, each in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ",".join(map(_dump, value)) + "]"
    elif isinstance(value, int) and abs(value) > 10**300:
        text = "1" + "0" * 400
    else:
        text = json.dumps(value)
    return "[" * depth + text + "]" * depth


def mutate(reader: Reader, content: bytes, rng: np.random.Generator) -> bytes:
    """The content of a good file, mutated in one way or the other."""
    if not reader.structured or rng.integers(3) == 0:
        return mutate_bytes(content, rng)
    if reader.structured == "jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        changed = mutate_value(lines, rng)
        lines = changed if isinstance(changed, list) else [changed]
        return "\n".join(map(_dump, lines)).encode("utf-8", "surrogatepass")
    if reader.structured == "yaml":
        import yaml

        if rng.integers(12) == 0:
            return BOMB
        return _dump(mutate_value(yaml.safe_load(content), rng)).encode("utf-8", "surrogatepass")
    return _dump(mutate_value(json.loads(content), rng)).encode("utf-8", "surrogatepass")


BOMB = b"a0: &a0 [x, x]\n" + b"".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n".encode() for n in range(1, 30))
"""Thirty lines of YAML that say 9 ** 29 things."""


# ---- running


def work(good: Path, seed: int, only: str | None) -> None:
    """Read numbers of mutations, and say what becomes of each."""
    import resource
    import warnings

    from mlx_starflow.errors import StarflowError

    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, io.StringIO()
    names = [only] if only else list(READERS)
    contents = {name: (good / READERS[name].file).read_bytes() for name in names}
    grown = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 if Path("/proc/self/statm").exists() else 0
    if grown:
        resource.setrlimit(resource.RLIMIT_AS, (grown + MEMORY,) * 2)
    for line in sys.stdin:
        number = int(line)
        name = names[number % len(names)]
        reader, rng = READERS[name], np.random.default_rng([seed, number])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(reader.file).name
            if reader.levels is not None:
                path = Path(folder) / "folder" / Path(reader.file).name
                shutil.copytree((good / reader.file).parent, path.parent)
            path.write_bytes(mutate(reader, contents[name], rng))
            try:
                reader.read(path)
                answer = "read"
            except StarflowError as error:
                answer = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else "error its message is long"
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                answer = (
                    f"error {type(error).__name__}: {str(error)[:150]!a} ({Path(place.filename).name}:{place.lineno})"
                )
        print(answer.replace("\n", " "), file=answers, flush=True)


class Worker:
    """A process that reads mutations, and another one when it has ended."""

    def __init__(self, good: Path, seed: int, only: str | None):
        self._command = [sys.executable, __file__, "--work", str(good), "--seed", str(seed)]
        self._command += ["--only", only] if only else []
        self._process: subprocess.Popen[str] | None = None

    def read(self, number: int) -> str:
        """What becomes of a mutation."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
            limit = 3 * LIMIT  # it has to import everything
        else:
            limit = LIMIT
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        answer = self._process.stdout.readline().strip() if ready else "hang"
        if not ready or not answer:
            self.close()
        return answer or "crash"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged and hostile files for every reader.")
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=READERS, help="one reader alone")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.seed, options.only)
        return
    names = [options.only] if options.only else list(READERS)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        make_good(Path(folder))
        worker = Worker(Path(folder), options.seed, options.only)
        for number in range(options.mutations):
            answer, name = worker.read(number), names[number % len(names)]
            result, _, _ = answer.partition(" ")
            counts[name][result] += 1
            if result not in ("read", "refused"):
                if not faults[f"{name}: {answer}"]:
                    print(f"mutation {number}, {name}: {answer}", flush=True)
                faults[f"{name}: {answer}"] += 1
        worker.close()
    width = max(map(len, names))
    print(f"{'':{width}}" + "".join(f"{result:>9}" for result in RESULTS))
    for name in [*names, "all"]:
        row = counts[name] if name != "all" else sum(counts.values(), Counter())
        print(f"{name:{width}}" + "".join(f"{row[result]:9}" for result in RESULTS))
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
