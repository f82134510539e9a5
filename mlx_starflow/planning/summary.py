"""A model in a few lines: architecture, sizes, defaults, licence, and the memory that generating takes.

And an image or a video, by what its file says.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow import __version__, cpu
from mlx_starflow.convert.official import RELEASES
from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels import MLX_VERSION
from mlx_starflow.kernels.memory import usable
from mlx_starflow.kernels.products import tf32
from mlx_starflow.media.files import is_folder, is_regular
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.directory import ModelDirectory, NetworkDirectory
from mlx_starflow.model_dir.fingerprint import fingerprint, read_made_of
from mlx_starflow.model_dir.hub import converted_directory, find_model
from mlx_starflow.model_dir.precision import MIXED
from mlx_starflow.model_dir.quantization import SHALLOW_BITS, dequantize_module
from mlx_starflow.model_dir.weights import automatic_precision, parameters
from mlx_starflow.models.flow import BlockConfig
from mlx_starflow.models.itarflow import ITarFlowConfig
from mlx_starflow.models.tarflow import PixelFlowConfig
from mlx_starflow.planning.chips import find_chips, time_report
from mlx_starflow.planning.class_memory import class_blocks, class_plans
from mlx_starflow.planning.memory import (
    HALF,
    MemoryPlan,
    ModelConfigs,
    packed_dtype,
    parameter_count,
    plans,
    trained_size,
)
from mlx_starflow.sampling.cache import KV_BITS, KVBits, can_quantize, check_quantizable, kv_name

PARTS = {"text encoder": "text_encoder", "autoencoder": "vae"}
"""The networks beside a flow, and their folders."""

MACS = (8, 16, 24, 32, 64)
LARGE_MACS = (24, 32, 48, 64, 96, 128)
"""Memory, in GB, of the Macs that `memory_report` speaks of, and of those for models that need more."""

QUICK = 0.05
"""Seconds in which the CPU's speed is measured, so that `info` does not make anybody wait."""

MOST_SHOWN = 1000
"""Characters of a value in a file's metadata that are shown."""


def summarize(model: str) -> dict[str, str]:
    """Name -> one line of text about a model. Raises StarflowError.

    Args:
        model: "demo", a directory or a Hub repository; an official release need not be there.
    """
    device = mx.default_device().type.name.upper()
    lines = {"mlx-starflow": f"{__version__}, MLX {MLX_VERSION} on the {device}, Python {platform.python_version()}"}
    lines["BLAS"] = f"{cpu.describe()}, {cpu.gflops(seconds=QUICK):.1f} GFLOPS on the CPU"
    lines["float32"] = (
        "products are TF32 (MLX_ENABLE_TF32): certificates and round trips do not hold"
        if tf32()
        else ("products are whole: TF32 is off, or this device has none")
    )
    if cpu.has_fast_networks():
        lines["sampling"] = f"in C++ on {cpu.network_threads()} CPUs; half precision, mxfp and nvfp in MLX"
    if configs := _release(model):
        lines["model"] = f"{model} (starflow), not converted yet: mlx-starflow convert {model}"
        lines |= _architecture(configs.flow)
        for part, network in configs.networks().items():
            lines[part] = f"{parameter_count(network) / 1e6:.2f} M parameters"
        lines["guidance"] = str(configs.guidance)
        return lines
    directory = ModelDirectory.find(model)
    lines["model"] = f"{model} ({directory.flow.content['model_type']}) in {directory.path}"
    lines |= describe_model(directory)
    missing = [title for title, part in PARTS.items() if not directory.has(part)]
    if missing and directory.reads_prompts:
        lines["lacks"] = f"{' and '.join(missing)}: a flow alone, which makes no pictures of prompts"
    lines |= _precision(directory)
    if origin := read_made_of(directory.path):
        lines["made of"] = _origin(*origin)
    for name, value in directory.pipeline.items():
        lines[name] = str(value)
    if licences := directory.licences:
        lines["licence"] = f"see {', '.join(licences)} there"
    return lines


def describe_model(directory: ModelDirectory) -> dict[str, str]:
    """Name -> one line of text about a model's networks: structure and sizes. Raises StarflowError."""
    lines = _architecture(directory.flow.config) | {"flow": _size(directory.flow)}
    for title, part in PARTS.items():
        if directory.has(part):
            lines[title] = _size(getattr(directory, part))
    return lines


def summarize_file(path: Path) -> dict[str, str]:
    """Name -> one line of text about how an image or a video was made. Raises StarflowError if it does not say."""
    found = read_metadata(path)
    settings = found.pop("settings", {})
    lines = {"file": _line(str(path))}
    for name, value in {**found, **(settings if isinstance(settings, dict) else {"settings": settings})}.items():
        if value is not None:
            lines[_line(name)] = _line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if "made_by" not in found:
        command = "video" if "frames" in lines else "generate"
        lines["again"] = f"mlx-starflow {command} --like {_line(str(path))}"
    return lines


def _origin(name: str, mark: str) -> str:
    """Of which weights a copy was made, and whether they are still there."""
    line = f"{_line(name)}, weights {mark}"
    try:
        now = fingerprint(find_model(name, download=False))
    except StarflowError:
        return line
    return line if now == mark else f"{line}; that model has other weights now"


def _line(text: str) -> str:
    """A text of somebody else's on one line, cut, without what a terminal would obey."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:MOST_SHOWN])
    return shown + ("..." if len(text) > MOST_SHOWN else "")


def memory_report(
    model: str,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    frames: int | None = None,
    kv_bits: KVBits = 0,
) -> list[str]:
    """What generating takes at each precision, and the Macs it runs on, computed from the model's configs.

    Args:
        model: as in `summarize`.
        size: (width, height) of the images or videos in pixels; None: what the model was trained at.
        batch: images or videos at once.
        frames: of videos; None: as many as the model was trained at.
        kv_bits: of keys and values in the table; which Macs have the memory is said for all.

    Returns:
        Lines of text; none for a model that reads prompts and lacks its text encoder or autoencoder.

    Raises:
        StarflowError: there is no such model, a config is not usable, or the model makes no images of that size.
    """
    configs = model_configs(model)
    if configs is None:
        return _class_report(model, size, batch, frames, kv_bits)
    if frames is not None and not configs.flow.video:
        raise StarflowError(f"--frames is about videos, and {model} makes pictures: leave it out")
    found = _each_kind(
        configs.flow.blocks, kv_bits, lambda bits: plans(configs, size=size, batch=batch, frames=frames, kv_bits=bits)
    )
    width, height = size or trained_size(configs.flow, configs.vae)
    images = _images(batch)
    if configs.flow.video:
        videos = "one video" if batch == 1 else f"{batch} videos at once"
        images = f"{videos} of {frames or configs.flow.video[0]} frames"
    notes = [
        f"8, 6 and 4 bit: of the flow, which computes in {packed_dtype(configs.flow)}; the other networks are {HALF}."
    ]
    return _report(found, kv_bits, f"{images} of {width}x{height}", notes)


def _class_report(
    model: str, size: tuple[int, int] | None, batch: int, frames: int | None, kv_bits: KVBits
) -> list[str]:
    """`memory_report` of a model of classes; nothing of another one."""
    directory = ModelDirectory.find(model)
    config = directory.flow.config
    if not isinstance(config, PixelFlowConfig):
        return []
    own = config.img_size, config.img_size
    if frames is not None:
        raise StarflowError(f"--frames is about videos, and {model} makes pictures: leave it out")
    if size not in (None, own):
        raise StarflowError(f"{model} knows pictures of {own[0]}x{own[1]} pixels alone: leave out the size")
    notes = ["8, 6 and 4 bit: weights of the layers; float32 is computed in."]
    found = _each_kind(class_blocks(directory), kv_bits, lambda bits: class_plans(directory, batch=batch, kv_bits=bits))
    return _report(found, kv_bits, f"{_images(batch)} of {own[0]}x{own[1]}", notes)


def _each_kind(
    blocks: Sequence[BlockConfig], kv_bits: KVBits, plans_of: Callable[[KVBits], dict[str, MemoryPlan]]
) -> dict[KVBits, dict[str, MemoryPlan]]:
    """The plans for each number of bits that keys and values may have. Raises StarflowError if `kv_bits` is none."""
    check_quantizable(blocks, kv_bits)
    return {bits: plans_of(bits) for bits in (KV_BITS if can_quantize(blocks) else KV_BITS[:1])}


def _in_bits(bits: KVBits) -> str:
    if isinstance(bits, tuple):
        return f"in {bits[0]} bits, null in {bits[1]}"
    return f"in {bits} bits" if bits else "as computed"


def _images(batch: int) -> str:
    return "one picture" if batch == 1 else f"{batch} pictures at once"


def _report(
    each_kind: dict[KVBits, dict[str, MemoryPlan]], kv_bits: KVBits, images: str, notes: list[str]
) -> list[str]:
    """Plans by precision as a table, keys and values in `kv_bits`; of a model of several networks with one of them in
    memory at a time, too."""
    found = each_kind[kv_bits]
    largest = max(each.peak() for each in found.values())
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    parts = list(next(iter(found.values())).weights)

    def row(label: str, values: list[str]) -> str:
        return f"{label:<26}" + "".join(f"{value:>14}" for value in values)

    def sizes(values: list[int]) -> list[str]:
        return [f"{value / unit:.2f}" for value in values]

    lines = [
        f"Memory in {name} for {images}: computed from the configs, not measured.",
        *notes,
        *([f"Keys and values are {_in_bits(kv_bits)}."] if kv_bits else []),
        "",
        row("weights", list(found)),
    ]
    for part in ("flow", *(part for part in PARTS if part in parts)):
        lines.append(row(f"  {part}", sizes([each.weights[part] for each in found.values()])))
    lines += ["", row("keys and values", list(found))]
    for bits, of_kind in each_kind.items():
        title = f"  {_in_bits(bits)}"
        lines.append(row(title, sizes([each.kv_cache for each in of_kind.values()])))
    several = len(parts) > 1
    peaks = [("peak, all in memory", False), ("peak with --low-memory", True)] if several else [("peak", False)]
    for title, low_memory in peaks:
        lines += ["", row(title, list(found))]
        phases = [each.phases(low_memory) for each in found.values()]
        lines += [row(f"  {phase}", sizes([each[phase] for each in phases])) for phase in phases[0]]
    lines += ["", row("Macs", list(found))]
    reduced = False
    smallest = min(each.peak(low_memory=several) for each in each_kind[0].values())
    macs = MACS if smallest <= usable(16 * 2**30) else LARGE_MACS
    for memory in macs:
        verdicts = [_verdict({bits: kind[name] for bits, kind in each_kind.items()}, memory, several) for name in found]
        lines.append(row(f"  {memory} GB", verdicts))
        reduced |= any(verdict.startswith("--kv") for verdict in verdicts)
    shares = ", ".join(f"{usable(memory * 2**30) / 2**30:.1f} of {memory}" for memory in macs)
    if reduced:
        both = ", and --low-memory with it" if several else ""
        lines.append(f"--kv-bits{both}: chosen by itself where memory is short.")
    return [
        *lines,
        f"The GPU is taken to get 70% of memory up to 32 GB, 75% above: {shares}.",
        "That is about what macOS reports as Metal's recommendedMaxWorkingSetSize; it differs between versions.",
    ]


def time_reports(model: str, chip: str, *, size: tuple[int, int] | None = None) -> list[list[str]]:
    """How long an image should take on an Apple chip, estimated from published figures: see `chips`.

    Args:
        model: as in `summarize`.
        chip: such as "M4" or "M3 Max"; there are two of the latter, so there are two reports.
        size: (width, height) of the image in pixels; None: what the model was trained at.

    Raises:
        StarflowError: there is no such chip or model, or the model does not make images from prompts.
    """
    found = find_chips(chip)
    configs = model_configs(model)
    if configs is None:
        raise StarflowError(f"--chip is for models that make pictures from prompts, and {model} is not a whole one")
    if configs.flow.video:
        raise StarflowError(f"--chip estimates how long pictures take, and {model} makes videos: leave it out")
    return [time_report(configs, one, size) for one in found]


def model_configs(model: str) -> ModelConfigs | None:
    """The configs of a model that reads prompts, even of a release that is not there; None if it lacks a part.

    Raises:
        StarflowError: there is no such model, or a config is not usable.
    """
    if configs := _release(model):
        return configs
    directory = ModelDirectory.find(model)
    whole = directory.reads_prompts and all(map(directory.has, PARTS.values()))
    return ModelConfigs.read(directory) if whole else None


def _verdict(expected: dict[KVBits, MemoryPlan], gigabytes: int, several: bool) -> str:
    """How a Mac of this much memory makes it, by the plans for each number of bits of keys and values."""
    if expected[0].fits(gigabytes):
        return "yes"
    for bits, each in expected.items():
        if each.fits(gigabytes, low_memory=several):
            return f"--kv-bits {kv_name(bits)}" if bits else "--low-memory"
    return "no"


def _release(model: str) -> ModelConfigs | None:
    """Configs of an official release that has not been converted; None of any other model."""
    if model.lower() not in RELEASES or is_folder(Path(model)):
        return None
    return None if is_regular(converted_directory(model) / "config.json") else ModelConfigs.of_release(model)


def _precision(directory: ModelDirectory) -> dict[str, str]:
    """What the networks compute in on this machine unless told otherwise, and why."""
    flow = directory.flow.precision
    lines = {"precision": f"{flow.dtype}: {flow.why}"}
    if flow.fallback:
        lines["precision"] += f"; {flow.fallback} if numbers leave its range, float32 for editing"
    other = automatic_precision()
    if directory.has("vae") and other.dtype != flow.dtype:
        lines["beside it"] = f"{other.dtype}: {other.why}"
    return lines


def _architecture(flow: Any) -> dict[str, str]:
    lines = {}
    blocks = [flow.block(index) for index in range(flow.blocks)] if isinstance(flow.blocks, int) else flow.blocks
    for index, block in reversed(list(enumerate(blocks))):
        kind = f"{block.num_layers} layers, width {block.channels}" if block.num_layers else "identity"
        order = "backwards" if block.flip else "forwards"
        text = ", reads text" if getattr(block, "txt_dim", 0) else ""
        lines[f"block {index}"] = f"{kind}, {order}{text}"
    each = " a frame" if getattr(flow, "video", None) else ""
    if not getattr(flow, "txt_size", 0):  # of others the memory report says so
        lines["pictures"] = f"{flow.img_size}x{flow.img_size} pixels, {flow.channel_size} channels"
    patches = {getattr(block, "patch_size", flow.patch_size): block.in_channels for block in blocks}
    lines["tokens"] = "; ".join(
        f"{(flow.img_size // patch) ** 2}{each} of {numbers} numbers, patches of {patch}"
        for patch, numbers in patches.items()
    )
    if isinstance(flow, ITarFlowConfig):
        lines["noise"] = f"levels {flow.t0:g} to {flow.t1:g}"
    elif isinstance(flow, PixelFlowConfig):
        lines["noise"] = f"{flow.noise_std:g}" if flow.noise_type == "gaussian" else flow.noise_type
    if video := getattr(flow, "video", None):
        lines["videos"] = f"{video[0]} frames, {video[1]} a second, as trained; pictures too"
    if denoiser := getattr(flow, "denoiser", None):
        text = ", reads text" if denoiser.txt_dim else ""
        lines["denoiser"] = f"{denoiser.num_layers} layers, width {denoiser.channels}{text}"
    if getattr(flow, "num_classes", 0):
        lines["classes"] = str(flow.num_classes)
    if getattr(flow, "txt_size", 0):
        lines["text"] = f"{flow.txt_size} tokens of {flow.txt_dim} numbers"
    return lines


def _size(network: NetworkDirectory[nn.Module, Any]) -> str:
    """Parameters (packed weights unpacked) and bytes on disk."""
    stored = network.lazy()
    size = sum(value.nbytes for value in parameters(stored).values())
    dequantize_module(stored)
    return f"{parameter_count(stored) / 1e6:.2f} M parameters, {size / 2**20:.1f} MiB, {_stored(network)}"


def _stored(network: NetworkDirectory[nn.Module, Any]) -> str:
    """What weights are stored in: a dtype, or how they are quantized, by the name that `--quantize` takes."""
    if not (quantization := network.quantization):
        dtypes = {str(value.dtype).removeprefix("mlx.core.") for value in parameters(network.lazy()).values()}
        return " and ".join(sorted(dtypes))
    mode, bits, size = (quantization.get(key) for key in ("mode", "bits", "group_size"))
    others = {own["bits"] for own in quantization.values() if isinstance(own, Mapping) and "bits" in own} - {bits}
    inner = f", {' and '.join(map(str, sorted(others)))} in some layers" if others else ""
    if mode in (None, "affine"):
        name = MIXED if others == {SHALLOW_BITS} and bits == 4 else "quantized"
        return f"{name}: {bits} bits{inner}, groups of {size}"
    return f"{mode}: {bits} bits{inner}, groups of {size}"
