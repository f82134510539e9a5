"""Model directories: `config.json` and `model*.safetensors`; reading them into modules, quantizing, writing.

A network's `config.json` holds its config, its `model_type` and, for quantized weights, `quantization`: what mlx-lm
writes there, `{"group_size": 64, "bits": 4, "mode": "affine"}`, with settings of single layers under their paths.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from mlx_starflow.errors import StarflowError
from mlx_starflow.hub import find_model

if TYPE_CHECKING:
    from mlx_starflow.models.autoencoder_kl import AutoencoderKL
    from mlx_starflow.models.starflow import STARFlow
    from mlx_starflow.models.t5 import T5Config, T5Encoder
    from mlx_starflow.models.tarflow import TarFlow
    from mlx_starflow.tokenizer import Tokenizer

M = TypeVar("M", bound=nn.Module)

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

QUANTIZATIONS = {
    "8": ("affine", 8, 64),
    "6": ("affine", 6, 64),
    "4": ("affine", 4, 64),
    "mxfp8": ("mxfp8", 8, 32),
    "mxfp4": ("mxfp4", 4, 32),
    "nvfp4": ("nvfp4", 4, 16),
}
"""What `--quantize` takes: MLX's mode, bits a weight, and how many weights share a scale."""

DENSE_LAYERS = ("proj_in", "proj_out", "relative_attention_bias")
"""Layers that stay as they are: small ones that hand over tokens and affine parameters, and T5's position bias."""

FLOWS = {"starflow": ("STARFlow", "FlowConfig"), "tarflow": ("TarFlow", "TarFlowConfig")}
"""Flows by the `model_type` of their `config.json`, which is also their module's name: network and config class."""

_INDEX = "model.safetensors.index.json"
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

_SAFETENSORS_DTYPES = {
    mx.float64: "F64",
    mx.float32: "F32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.bool_: "BOOL",
    **{getattr(mx, f"uint{bits}"): f"U{bits}" for bits in (8, 16, 32, 64)},
    **{getattr(mx, f"int{bits}"): f"I{bits}" for bits in (8, 16, 32, 64)},
}


# ---- dtypes


def default_dtype() -> mx.Dtype:
    """float32 on CPU, where half precision is slow; bfloat16 on a GPU."""
    return mx.float32 if _on_cpu() else mx.bfloat16


def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    """The dtype called "float32", "bfloat16" or "float16"; None and these dtypes themselves come back as they are.

    Raises:
        StarflowError: it is none of these.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise StarflowError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _on_cpu() -> bool:
    return mx.default_device().type == mx.cpu


# ---- reading


def one_line(error: BaseException) -> str:
    """An exception's message, fit to be part of a StarflowError's."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises StarflowError, naming it, if it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StarflowError(f"cannot read {path}: {one_line(error)}") from error
    except ValueError as error:
        raise StarflowError(f"cannot read {path}: {path.name} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise StarflowError(f"cannot read {path}: it holds a JSON {type(content).__name__}, not an object")
    return content


def read_config(directory: str | Path) -> dict[str, Any]:
    """A model directory's `config.json`.

    Raises:
        StarflowError: it is missing or not a JSON object, so this is no (whole) model directory.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        what = "holds no config.json" if directory.is_dir() else "is not a folder"
        raise StarflowError(f"{directory} {what}; give a model directory, such as `mlx-starflow convert` writes")
    return read_json(directory / "config.json")


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """The tensors of one file, each of them read when it is evaluated.

    Raises:
        StarflowError: the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise StarflowError(f"{path} is missing; download it into {path.parent}")
    try:
        # Opening it this way also compares the header with the file's size; MLX alone may notice only when it reads.
        with safe_open(path, framework="numpy"):
            pass
        return mx.load(str(path), format="safetensors")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise StarflowError(f"cannot read {path}, download it again or convert it again: {one_line(error)}") from error


def read_index(path: Path) -> dict[str, str]:
    """The file that holds each tensor, from an `.index.json`. Raises StarflowError if it is not one."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise StarflowError(f"{path} has no weight_map; download it again or convert it again")
    return index


def load_weights(directory: str | Path) -> dict[str, mx.array]:
    """Tensors by name from `model.safetensors`, or from the files of `model.safetensors.index.json`; read lazily.

    Raises:
        StarflowError: a file is missing, truncated or no safetensors file.
    """
    directory = Path(directory)
    if (directory / _INDEX).is_file():
        files = sorted(set(read_index(directory / _INDEX).values()))
    elif (directory / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise StarflowError(f"{directory} holds no model.safetensors; download it again or convert it again")
    return {name: array for file in files for name, array in read_safetensors(directory / file).items()}


# ---- modules


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """A module's tensors by name. Those of a new module are not computed as long as nobody evaluates them."""
    return dict(tree_flatten(module.parameters()))


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str | Path
) -> None:
    """Every tensor that is needed, no other, and of its shape.

    Raises:
        StarflowError: naming the first tensor that is missing, unexpected or of another shape.
    """
    if missing := [name for name in expected if name not in found]:
        raise StarflowError(
            f"{what} lacks the tensor {missing[0]}{_and_more(missing)}; is it complete, and is the config its own?"
        )
    if unexpected := sorted(found.keys() - expected.keys()):
        raise StarflowError(
            f"{what} has a tensor that its config does not account for: {unexpected[0]}{_and_more(unexpected)}"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise StarflowError(f"{what}: {name} has shape {tuple(found[name])}, but its config says {tuple(shape)}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def load_module(
    module: M,
    weights: Mapping[str, mx.array],
    what: str | Path,
    dtype: mx.Dtype | None = None,
    *,
    quantization: Mapping[str, Any] | None = None,
) -> M:
    """Put weights into a module, and read them. Layers whose `.scales` the weights hold become quantized ones.

    Args:
        module: the network, newly made.
        weights: its tensors by name.
        what: what to call the weights in error messages, such as their directory.
        dtype: of floating tensors; packed weights stay as they are. None: theirs. On CPU, quantized layers' scales are
            float32 whatever is asked for, because half-precision sums there lose two digits.
        quantization: `quantization` of the config.

    Returns:
        `module`.

    Raises:
        StarflowError: a tensor is missing, unexpected, of another shape or kind, or cannot be read; or the weights are
            quantized and `quantization` does not say how.
    """
    _quantize_as(module, weights, what, quantization)
    expected = parameters(module)
    check_shapes({n: w.shape for n, w in weights.items()}, {n: w.shape for n, w in expected.items()}, what)
    scales = {f"{path}.{kind}" for path in quantized_layers(module) for kind in ("scales", "biases")}
    loaded = []
    for name, placeholder in expected.items():
        weight = weights[name]
        if _is_floating(weight) != _is_floating(placeholder):
            raise StarflowError(f"{what}: {name} is {_dtype_name(weight)}, not {_dtype_name(placeholder)}")
        if _is_floating(weight):
            weight = weight.astype(mx.float32 if name in scales and _on_cpu() else dtype or weight.dtype)
        loaded.append((name, weight))
    module.load_weights(loaded)
    try:
        mx.eval(module.parameters())
    except RuntimeError as error:
        raise StarflowError(f"cannot read {what}: {one_line(error)}") from error
    return module


def _is_floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _dtype_name(array: mx.array) -> str:
    return str(array.dtype).rpartition(".")[2]


# ---- quantization


def quantized_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers by path."""
    layers = tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: layer for path, layer in layers if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)}


def quantize_module(
    module: nn.Module,
    how: int | str,
    group_size: int | None = None,
    predicate: Callable[[str, nn.Module], bool | dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Quantize a module's linear and embedding layers in place, those excepted whose rows are not whole groups.

    Args:
        module: a network.
        how: bits of MLX's affine mode, 8, 6 or 4, or "mxfp8", "mxfp4" or "nvfp4".
        group_size: weights that share a scale; None: 64 in the affine mode, the mode's own in the others.
        predicate: from a layer's path and the layer, whether to quantize it, or settings of its own
            (`group_size`, `bits`, `mode`). None: all but `DENSE_LAYERS`.

    Returns:
        `quantization` for the module's config.

    Raises:
        StarflowError: `how` or `group_size` is not known, or no layer can be quantized.
    """
    if str(how) not in QUANTIZATIONS:
        raise StarflowError(f"cannot quantize to {how!r}; it must be one of {', '.join(QUANTIZATIONS)}")
    mode, bits, default_group_size = QUANTIZATIONS[str(how)]
    settings: dict[str, Any] = {"group_size": group_size or default_group_size, "bits": bits, "mode": mode}
    predicate = predicate or (lambda path, layer: path.rpartition(".")[2] not in DENSE_LAYERS)
    own: dict[str, Any] = {}

    def choose(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(layer, "to_quantized") or not (chosen := predicate(path, layer)):
            return False
        chosen = settings | chosen if isinstance(chosen, dict) else settings
        if layer.weight.shape[-1] % chosen["group_size"]:
            return False
        if chosen != settings:
            own[path] = chosen
        return chosen

    try:
        nn.quantize(module, class_predicate=choose)
    except ValueError as error:
        raise StarflowError(f"cannot quantize to {how!r}: {one_line(error)}") from error
    if not quantized_layers(module):
        raise StarflowError(
            f"cannot quantize to {how!r}: no layer is a multiple of {settings['group_size']} wide; leave it as it is"
        )
    return settings | own


def _quantize_as(
    module: nn.Module, weights: Mapping[str, mx.array], what: str | Path, quantization: Mapping[str, Any] | None
) -> None:
    """Make quantized layers of those whose scales the weights hold."""
    if not any(name.endswith(".scales") for name in weights):
        return
    if not isinstance(quantization, Mapping):
        raise StarflowError(f"{what}: the weights are quantized, but config.json has no quantization; convert again")

    def choose(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(layer, "to_quantized") or f"{path}.scales" not in weights:
            return False
        own = quantization.get(path)
        settings = own if isinstance(own, dict) else quantization
        return {key: settings[key] for key in ("group_size", "bits", "mode") if key in settings}

    try:
        nn.quantize(module, class_predicate=choose)
    except (TypeError, ValueError) as error:
        raise StarflowError(f"{what}: quantization of config.json: {one_line(error)}") from error


# ---- writing


def save_model(
    directory: str | Path,
    weights: Mapping[str, mx.array],
    config: Mapping[str, Any],
    *,
    max_shard_gb: float = 5,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model directory, or the same kind of model's again: all of it or, as far as loading goes, nothing.

    Every file is written under another name first. Then the old `config.json` and weights go, the new files take their
    names, and `config.json`, without which no directory loads, comes last.

    Args:
        directory: made if need be; other files in it are left alone.
        weights: tensors by name; lazy ones are computed one after the other.
        config: what `config.json` is to hold.
        max_shard_gb: weights beyond this size, in 10^9 bytes, go to several files with an index.
        files: contents of further files by name.

    Returns:
        `directory`.

    Raises:
        StarflowError: it cannot be written, or holds a model of another `model_type`.
    """
    return save_tensors(directory, weights, weights.items(), config, max_shard_gb=max_shard_gb, files=files)


def save_tensors(
    directory: str | Path,
    layout: Mapping[str, mx.array],
    tensors: Iterable[tuple[str, mx.array]],
    config: Mapping[str, Any],
    *,
    max_shard_gb: float = 5,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """`save_model` for weights that come one at a time, in any order: no more than one of them need be in memory.

    `layout` says which will come, by arrays of the same shape and dtype that are never evaluated.
    """
    directory = Path(directory)
    _refuse_other_model(directory, config)
    shards = _shards(layout, max_shard_gb)
    texts = dict(files or {})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in layout.values())},
            "weight_map": {name: shard for shard, names in shards.items() for name in names},
        }
        texts[_INDEX] = _json(index)
    texts["config.json"] = _json(config)
    with _partial_files(directory, [*shards, *texts]) as partial:
        _write_shards({partial[shard]: {n: layout[n] for n in names} for shard, names in shards.items()}, tensors)
        for name, content in texts.items():
            partial[name].write_bytes(content)
        (directory / "config.json").unlink(missing_ok=True)
        for old in list(directory.iterdir()):
            if _WEIGHT_FILE.fullmatch(old.name):
                old.unlink()
        for name, path in partial.items():
            os.replace(path, directory / name)
    return directory


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _refuse_other_model(directory: Path, config: Mapping[str, Any]) -> None:
    """A text encoder must not overwrite the flow in whose directory it belongs as a folder."""
    if not (directory / "config.json").is_file():
        return
    found, written = read_json(directory / "config.json").get("model_type"), config.get("model_type")
    if found != written:
        raise StarflowError(f"{directory} holds another model ({found!r}, not {written!r}); give another folder")


@contextmanager
def _partial_files(directory: Path, names: list[str]) -> Iterator[dict[str, Path]]:
    """Where to write files before they get their names, in that order; what is left of them is removed."""
    partial = {name: directory / f"partial-{name}" for name in names}
    created = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        raise StarflowError(f"cannot write {directory}: {one_line(error)}") from error
    finally:
        with suppress(OSError):
            for path in partial.values():
                path.unlink(missing_ok=True)
            if created:
                directory.rmdir()  # only succeeds on an empty one


def _shards(layout: Mapping[str, mx.array], max_shard_gb: float) -> dict[str, list[str]]:
    """Tensors' names by file, in order; a tensor larger than a shard has a file of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, array in layout.items():
        if groups[-1] and size + array.nbytes > max_shard_gb * 1e9:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += array.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shards(shards: Mapping[Path, Mapping[str, mx.array]], tensors: Iterable[tuple[str, mx.array]]) -> None:
    """Safetensors files, each tensor written to its place when it comes."""
    places: dict[str, tuple[Path, int]] = {}
    for path, layout in shards.items():
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        at = 0
        # Larger elements first, so that each tensor starts at a multiple of its element's size.
        for name, array in sorted(layout.items(), key=lambda item: -item[1].dtype.size):
            end = at + array.nbytes
            dtype = _SAFETENSORS_DTYPES[array.dtype]
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, end]}
            places[name] = (path, at)
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, start + at)
        places.update({name: (path, start + places[name][1]) for name in layout})
    for name, array in tensors:
        path, at = places.pop(name)
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(memoryview(array.reshape(-1).view(mx.uint8)))
        del array
        mx.clear_cache()
    if places:
        raise KeyError(f"no array came for {next(iter(places))}")


# ---- models


def flow_module(model_type: str) -> tuple[ModuleType, type[nn.Module], type]:
    """A flow's module (for its `sanitize`), network and config class."""
    module = importlib.import_module(f"mlx_starflow.models.{model_type}")
    network, config = FLOWS[model_type]
    return module, getattr(module, network), getattr(module, config)


def load_flow(path_or_id: str | Path, dtype: str | mx.Dtype | None = None) -> STARFlow | TarFlow:
    """The flow of a model directory.

    Args:
        path_or_id: "demo", a model directory or a Hugging Face repository of one (see `find_model`).
        dtype: "float32", "bfloat16" or "float16"; None: float32 on CPU, bfloat16 on a GPU.

    Raises:
        StarflowError: there is no such model, or it is incomplete, damaged or of an unknown type.
    """
    dtype = parse_dtype(dtype) or default_dtype()
    directory = find_model(path_or_id)
    config = read_config(directory)
    model_type = config.get("model_type")
    if model_type not in FLOWS:
        raise StarflowError(
            f"{directory / 'config.json'}: model_type {model_type!r} is not a flow's, {' or '.join(FLOWS)}; "
            "convert an official checkpoint with: mlx-starflow convert flow CHECKPOINT --config YAML -o DIR"
        )
    _, network, config_class = flow_module(model_type)
    return _load(network, config_class, directory, config, dtype)


def load_text_encoder(directory: str | Path, dtype: str | mx.Dtype | None = None) -> tuple[T5Encoder, Tokenizer]:
    """The text encoder in a folder with `spiece.model` beside its weights; `dtype` as in `load_flow`.

    Raises:
        StarflowError: a file is missing or damaged, or tokenizer and encoder do not belong together.
    """
    from mlx_starflow.models.t5 import T5Config, T5Encoder

    directory = Path(directory)
    encoder = _load(T5Encoder, T5Config, directory, read_config(directory), parse_dtype(dtype) or default_dtype())
    return encoder, read_tokenizer(directory / "spiece.model", encoder.config)


def read_tokenizer(path: Path, config: T5Config) -> Tokenizer:
    """A text encoder's tokenizer. Raises StarflowError if it is unusable or has more tokens than the encoder."""
    from mlx_starflow.tokenizer import Tokenizer

    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise StarflowError(
            f"{path} has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}; "
            "use the spiece.model of this checkpoint"
        )
    return tokenizer


def load_vae(directory: str | Path, dtype: str | mx.Dtype | None = None) -> AutoencoderKL:
    """The image autoencoder in a folder; `dtype` as in `load_flow`.

    Raises:
        StarflowError: a file is missing or damaged.
    """
    from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

    config = read_config(directory)
    return _load(AutoencoderKL, AutoencoderKLConfig, Path(directory), config, parse_dtype(dtype) or default_dtype())


def _load(network: type[M], config_class: type, directory: Path, config: dict[str, Any], dtype: mx.Dtype) -> M:
    try:
        module = network(config_class.from_dict(config))
    except (StarflowError, ArithmeticError, TypeError, ValueError) as error:
        raise StarflowError(f"{directory / 'config.json'}: {one_line(error)}") from error
    weights = load_weights(directory)
    return load_module(module, weights, directory, dtype, quantization=config.get("quantization"))
