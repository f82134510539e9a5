"""Model directories, `config.json` and `model*.safetensors`, and reading them into modules.

A network's `config.json` holds its config, its `model_type` and, for quantized weights, `quantization`: what mlx-lm
writes there, `{"group_size": 64, "bits": 4, "mode": "affine"}`, with settings of single layers under their paths.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.hub import find_model
from mlx_starflow.model_dir.quantization import quantize_as, quantized_layers

if TYPE_CHECKING:
    from mlx_starflow.models.autoencoder_kl import AutoencoderKL
    from mlx_starflow.models.autoencoder_wan.network import AutoencoderWan
    from mlx_starflow.models.starflow import STARFlow
    from mlx_starflow.models.t5 import T5Config, T5Encoder
    from mlx_starflow.models.tarflow import TarFlow
    from mlx_starflow.models.tokenizer import Tokenizer

M = TypeVar("M", bound=nn.Module)

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

FLOWS = {"starflow": ("STARFlow", "FlowConfig"), "tarflow": ("TarFlow", "TarFlowConfig")}
"""Flows by the `model_type` of their `config.json`, which is also their module's name: network and config class."""

INDEX_FILE = "model.safetensors.index.json"

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
    if (directory / INDEX_FILE).is_file():
        files = sorted(set(read_index(directory / INDEX_FILE).values()))
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


def place_weights(
    module: nn.Module,
    weights: Mapping[str, mx.array],
    what: str | Path,
    *,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """`load_module` that reads nothing: each tensor comes from its file when it is evaluated, in the file's dtype."""
    quantize_as(module, weights, what, quantization)
    expected = parameters(module)
    check_shapes({n: w.shape for n, w in weights.items()}, {n: w.shape for n, w in expected.items()}, what)
    for name, placeholder in expected.items():
        if _is_floating(weights[name]) != _is_floating(placeholder):
            raise StarflowError(f"{what}: {name} is {_dtype_name(weights[name])}, not {_dtype_name(placeholder)}")
    module.load_weights(list(weights.items()))


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
    place_weights(module, weights, what, quantization=quantization)
    cast_weights(module, dtype)
    try:
        mx.eval(module.parameters())
    except RuntimeError as error:
        raise StarflowError(f"cannot read {what}: {one_line(error)}") from error
    return module


def cast_weights(module: nn.Module, dtype: mx.Dtype | None) -> None:
    """Give a module's weights the dtype that `load_module` says, without reading them."""
    scales = {f"{path}.{kind}" for path in quantized_layers(module) for kind in ("scales", "biases")}
    cast = []
    for name, weight in parameters(module).items():
        if _is_floating(weight):
            weight = weight.astype(mx.float32 if name in scales and _on_cpu() else dtype or weight.dtype)
        cast.append((name, weight))
    module.load_weights(cast)


def _is_floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _dtype_name(array: mx.array) -> str:
    return str(array.dtype).rpartition(".")[2]


# ---- models


def flow_module(model_type: str) -> tuple[ModuleType, type[nn.Module], type]:
    """A flow's module (for its `sanitize`), network and config class."""
    module = importlib.import_module(f"mlx_starflow.models.{model_type}")
    network, config = FLOWS[model_type]
    return module, getattr(module, network), getattr(module, config)


def load_flow(
    path_or_id: str | Path,
    dtype: str | mx.Dtype | None = None,
    adapters: Sequence[tuple[str | Path, float]] = (),
    group: mx.distributed.Group | None = None,
) -> STARFlow | TarFlow:
    """The flow of a model directory.

    Args:
        path_or_id: "demo", a model directory or a Hugging Face repository of one (see `find_model`).
        dtype: "float32", "bfloat16" or "float16"; None: float32 on CPU, bfloat16 on a GPU.
        adapters: folders of adapters with their strengths (1: as trained), see `adapters.add_adapters`.
        group: processes that compute it together, each with a part of it, see `tensor_parallel`.

    Raises:
        StarflowError: there is no such model, it is incomplete, damaged or of an unknown type, or an adapter does not
            fit it, or it cannot be split over the group.
    """
    from mlx_starflow.model_dir.adapters import add_adapters

    dtype = parse_dtype(dtype) or default_dtype()
    directory = find_model(path_or_id)
    config = read_config(directory)
    if group is not None:
        from mlx_starflow.model_dir.tensor_parallel import load_part

        if adapters:
            raise StarflowError("adapters cannot be split over ranks: fuse them into the model first")
        return load_part(directory, config, dtype, group)
    flow = _load(new_flow(directory, config), directory, config, dtype)
    add_adapters(flow, adapters)
    return flow


def new_flow(directory: Path, config: Mapping[str, Any]) -> STARFlow | TarFlow:
    """The flow that a model directory's `config.json` describes, without its weights. Raises StarflowError."""
    model_type = config.get("model_type")
    if model_type not in FLOWS:
        raise StarflowError(
            f"{directory / 'config.json'}: model_type {model_type!r} is not a flow's, {' or '.join(FLOWS)}; "
            "convert an official checkpoint with: mlx-starflow convert flow CHECKPOINT --config YAML -o DIR"
        )
    _, network, config_class = flow_module(model_type)
    return _new(network, config_class, directory, config)


def load_text_encoder(directory: str | Path, dtype: str | mx.Dtype | None = None) -> tuple[T5Encoder, Tokenizer]:
    """The text encoder in a folder with `spiece.model` beside its weights; `dtype` as in `load_flow`.

    Raises:
        StarflowError: a file is missing or damaged, or tokenizer and encoder do not belong together.
    """
    directory = Path(directory)
    config = read_config(directory)
    encoder = _load(new_text_encoder(directory, config), directory, config, parse_dtype(dtype) or default_dtype())
    return encoder, read_tokenizer(directory / "spiece.model", encoder.config)


def new_text_encoder(directory: Path, config: Mapping[str, Any]) -> T5Encoder:
    """The text encoder that a folder's `config.json` describes, without its weights. Raises StarflowError."""
    from mlx_starflow.models.t5 import T5Config, T5Encoder

    return _new(T5Encoder, T5Config, directory, config)


def read_tokenizer(path: Path, config: T5Config) -> Tokenizer:
    """A text encoder's tokenizer. Raises StarflowError if it is unusable or has more tokens than the encoder."""
    from mlx_starflow.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise StarflowError(
            f"{path} has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}; "
            "use the spiece.model of this checkpoint"
        )
    return tokenizer


def load_vae(directory: str | Path, dtype: str | mx.Dtype | None = None) -> AutoencoderKL | AutoencoderWan:
    """The autoencoder in a folder, of images or of videos; `dtype` as in `load_flow`.

    Raises:
        StarflowError: a file is missing or damaged, or the folder holds another kind of model.
    """
    directory = Path(directory)
    config = read_config(directory)
    return _load(new_vae(directory, config), directory, config, parse_dtype(dtype) or default_dtype())


def new_vae(directory: Path, config: Mapping[str, Any]) -> AutoencoderKL | AutoencoderWan:
    """The autoencoder that a folder's `config.json` describes, without its weights. Raises StarflowError."""
    if config.get("model_type") == "autoencoder_wan":
        from mlx_starflow.models.autoencoder_wan.network import AutoencoderWan, AutoencoderWanConfig

        return _new(AutoencoderWan, AutoencoderWanConfig, directory, config)
    from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

    return _new(AutoencoderKL, AutoencoderKLConfig, directory, config)


def _new(network: type[M], config_class: type, directory: Path, config: Mapping[str, Any]) -> M:
    try:
        return network(config_class.from_dict(config))
    except (StarflowError, ArithmeticError, TypeError, ValueError) as error:
        raise StarflowError(f"{directory / 'config.json'}: {one_line(error)}") from error


def _load(module: M, directory: Path, config: Mapping[str, Any], dtype: mx.Dtype) -> M:
    return load_module(module, load_weights(directory), directory, dtype, quantization=config.get("quantization"))
