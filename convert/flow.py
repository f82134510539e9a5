"""Official flow checkpoints (apple/ml-starflow, apple/ml-tarflow, apple/ml-itarflow) to model directories."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_starflow.convert.common import check_target, write_module
from mlx_starflow.convert.official import LICENSE as LICENSE
from mlx_starflow.convert.official import released_arguments
from mlx_starflow.convert.prefixes import open_flow_tensors
from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.files import read_yaml
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.directory import FLOWS
from mlx_starflow.model_dir.hub import find_checkpoint, hub_file
from mlx_starflow.model_dir.weights import parse_dtype
from mlx_starflow.models.configs import official_arguments

if TYPE_CHECKING:
    from mlx_starflow.models.starflow import STARFlow
    from mlx_starflow.models.tarflow import PixelFlow

_NOTICE = """\
{license}
Whoever passes them on passes on that agreement and this notice with them.

Changes: {checkpoint} was converted to MLX by `mlx-starflow convert flow`. Buffers that hold no weights were left out;
the weights were {changes}.
{other_parts}
None of this holds for weights that someone else trained and released under other terms.
"""

# The official training names its checkpoints so.
_TARFLOW_NAME = re.compile(
    r".+_model_(?P<patch>\d+)_(?P<channels>\d+)_(?P<blocks>\d+)_(?P<layers>\d+)_(?P<noise>\d+\.\d+)"
)


@checked
def convert_flow(
    checkpoint: str | Path,
    config: str | Path | None,
    out_dir: str | Path,
    *,
    quantize: int | str | None = None,
    dtype: str | mx.Dtype | None = None,
    arguments: Mapping[str, Any] | None = None,
    ema: bool = False,
) -> Path:
    """Write an official checkpoint of a STARFlow, a TarFlow or an iTARFlow as a model directory.

    Tensors are read, quantized and written one at a time: memory for the largest is enough. Which flow it is shows in
    its tensors: a TarFlow has learned positions, an iTARFlow embeds the noise level too. What the arguments leave open
    is taken from where it shows: the width of the text embeddings and the architecture of a flow over pixels from the
    tensors, a TarFlow's patch size and noise from the official file name,
    `NAME_model_PATCH_CHANNELS_BLOCKS_LAYERS_NOISE.pth`.

    Args:
        checkpoint: the official `.pth`, its tensors as `.safetensors`, in one file or in shards (their folder or
            `.index.json`), or the folder that sharded training wrote instead of a file
            (`torch.distributed.checkpoint`; reading it needs PyTorch). What trainers put before the tensors' names is
            taken off, see `prefixes`. Where there is no such file here, "owner/name/file.pth" is one on the Hugging
            Face Hub, and is downloaded into its cache.
        config: the official YAML of its arguments; None for a flow over pixels, and for a released checkpoint, whose
            arguments are known by its name.
        out_dir: folder to write, made if need be: `config.json`, `model*.safetensors` and `NOTICE`, which names the
            licence of Apple's weights. A flow that it holds is replaced.
        quantize: 8, 6 or 4 bits, "mxfp8", "mxfp4" or "nvfp4"; None leaves the weights as they are.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.
        arguments: official arguments by name that hold instead of the YAML's.
        ema: take the averaged weights that are beside the last ones.

    Returns:
        `out_dir`.

    Raises:
        StarflowError: a file is missing or damaged, or cannot be downloaded, an argument is missing, config and
            checkpoint do not belong together, or `out_dir` cannot be written or holds another kind of model.
    """
    out_dir, dtype = Path(out_dir), parse_dtype(dtype)
    if hub_file(checkpoint):
        # Before the download.
        check_outputs(folders=[out_dir])
    checkpoint = find_checkpoint(checkpoint)
    given = read_arguments(checkpoint, config) | dict(arguments or {})
    return write_flow(checkpoint, given, out_dir, quantize, dtype, config or checkpoint, ema=ema)


def read_arguments(checkpoint: Path, config: str | Path | None) -> dict[str, Any]:
    """The official arguments in a YAML file or, without one, those of a released checkpoint; else none."""
    if config is None:
        return dict(released_arguments(checkpoint) or {})
    return _read_yaml(Path(config))


def write_flow(
    checkpoint: Path,
    arguments: dict[str, Any],
    out_dir: Path,
    quantize: int | str | None,
    dtype: mx.Dtype | None,
    source: str | Path,
    *,
    pipeline: Mapping[str, Any] | None = None,
    other_parts: str = "",
    ema: bool = False,
) -> Path:
    """`convert_flow` with the arguments read.

    Args:
        source: what error messages call the arguments.
        pipeline: how to sample, for `config.json`.
        other_parts: what `NOTICE` has to say of the other networks.
        ema: see `convert_flow`.
    """
    check_target(checkpoint.parent, out_dir)
    check_target(checkpoint, out_dir)
    flow, model_type, tensors = open_flow(checkpoint, arguments, source, ema)
    changes = [f"cast to {str(dtype).rpartition('.')[2]}"] * (dtype is not None)
    changes += [f"quantized ({quantize})"] * (quantize is not None)
    notice = _NOTICE.format(
        license=LICENSE,
        checkpoint=checkpoint.name,
        changes=" and ".join(changes) or "kept as they were",
        other_parts=other_parts and f"\n{other_parts}\n",
    )
    config = {"model_type": model_type, **flow.config.to_dict()}
    if pipeline:
        config["pipeline"] = dict(pipeline)
    return write_module(
        out_dir,
        flow,
        tensors,
        config,
        source=checkpoint,
        dtype=dtype,
        quantize=quantize,
        files={"NOTICE": notice.encode()},
    )


def open_flow(
    checkpoint: Path, arguments: dict[str, Any], source: str | Path, ema: bool = False
) -> tuple[STARFlow | PixelFlow, str, dict[str, Tensor]]:
    """The flow of an official checkpoint without its weights, its `model_type`, and its tensors, none of them read yet.

    `source` is what error messages call the arguments; `ema` takes the averaged weights. Raises StarflowError.
    """
    tensors = open_flow_tensors(checkpoint, ema)
    model_type = "tarflow" if any(name.endswith(".pos_embed") for name in tensors) else "starflow"
    if any(".time_embed." in name for name in tensors):
        model_type = "itarflow"
    kind = FLOWS[model_type]
    tensors = kind.sanitize(tensors)
    if model_type == "tarflow":
        arguments = _tarflow_arguments(tensors, arguments, checkpoint)
    elif model_type == "itarflow":
        arguments = _itarflow_arguments(tensors, arguments, checkpoint)
    elif not arguments:
        raise StarflowError(
            f"{checkpoint} does not say how it was trained: give the YAML of its arguments (--config YAML), "
            "which is in the folder configs of github.com/apple/ml-starflow for the released ones"
        )
    elif arguments.get("txt_size") and "txt_dim" not in arguments:
        arguments = {**arguments, "txt_dim": _text_width(tensors, arguments, checkpoint)}
    try:
        return kind.network(kind.config.from_official(arguments)), model_type, tensors
    except (StarflowError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise StarflowError(f"{source}: {one_line(error)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    try:
        return official_arguments(content)
    except StarflowError:
        raise StarflowError(f"{path} is not an official config: it must hold the model's arguments") from None


def _text_width(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], checkpoint: Path) -> int:
    """Width of the text embeddings: what the projection reads, or the deep block's own width if there is none."""
    for name, tensor in tensors.items():
        if name.startswith("blocks.") and name.endswith(".proj_txt.weight"):
            return tensor.shape[-1]
    try:
        return int(arguments["top_block"]["channels"])
    except (KeyError, TypeError, ValueError):
        raise StarflowError(
            f"{checkpoint} has no tensor proj_txt.weight, so it reads no text: is it this config's checkpoint?"
        ) from None


def _tarflow_arguments(tensors: Mapping[str, Tensor], given: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """A TarFlow's arguments: those that are given, and the others from its tensors' shapes and its file's name."""
    try:
        length, channels = tensors["blocks.0.pos_embed"].shape
        width = tensors["blocks.0.proj_in.weight"].shape[1]
        labels = tensors.get("blocks.0.class_embed")
        found: dict[str, Any] = {
            "channels": channels,
            "blocks": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
            "layers_per_block": 1 + max(int(n.split(".")[3]) for n in tensors if n.startswith("blocks.0.attn_blocks.")),
            "expansion": tensors["blocks.0.attn_blocks.0.mlp.main.0.weight"].shape[0] // channels,
            "nvp": tensors["blocks.0.proj_out.weight"].shape[0] == 2 * width,
            "num_classes": labels.shape[0] if labels else 0,
        }
    except (KeyError, IndexError, ValueError):
        raise StarflowError(
            f"{checkpoint} is not a whole TarFlow: some tensors of its first block are missing"
        ) from None
    named = _TARFLOW_NAME.fullmatch(checkpoint.stem)
    shapes = tuple(found[key] for key in ("channels", "blocks", "layers_per_block"))
    others = named is not None and tuple(int(named[key]) for key in ("channels", "blocks", "layers")) != shapes
    patch = _size(given, "patch_size")
    if named and not others:
        found["noise_std"] = float(named["noise"])
        patch = patch or int(named["patch"])
    channel_size = _size(given, "channel_size") or (width // patch**2 if patch else 3)
    patch = patch or math.isqrt(width // channel_size)
    found |= {"patch_size": patch, "channel_size": channel_size, "img_size": math.isqrt(length) * patch}
    if channel_size * patch**2 != width:
        raise StarflowError(
            f"{checkpoint}: its tokens hold {width} numbers, not {channel_size} channels of {patch}x{patch} pixels; "
            "give --patch-size and --channel-size"
        )
    arguments = {**found, **given}
    if "noise_std" not in arguments and named:
        channels, blocks, layers = shapes
        raise StarflowError(
            f"{checkpoint} holds {blocks} blocks of {layers} layers, {channels} wide, and so it is not the model "
            "that its name speaks of: give the noise of its training, such as --noise-std 0.07"
        )
    if "noise_std" not in arguments:
        raise StarflowError(
            f"{checkpoint} does not say how much noise its training added; give it, such as --noise-std 0.07"
        )
    return arguments


def _itarflow_arguments(tensors: Mapping[str, Tensor], given: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """An iTARFlow's arguments: those that are given, and the others from its tensors' shapes."""
    channel_size = _size(given, "channel_size") or 3
    given = dict(given)
    if "patch_size" in given:
        given["patch_sizes"] = given.pop("patch_size")
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    shared = len({name.split(".")[1] for name in tensors if name.startswith("shared_backbone.")})
    names = [f"blocks.{index}" for index in range(count)]
    try:
        lengths, channels = zip(*(tensors[f"{name}.pos_embed"].shape for name in names), strict=True)
        widths = [tensors[f"{name}.proj_in.weight"].shape[1] for name in names]
        own = [{n.split(".")[3] for n in tensors if n.startswith(f"{name}.attn_blocks.")} for name in names]
        labels = tensors.get("blocks.0.class_embed")
        layer = "shared_backbone.0" if shared else "blocks.0.attn_blocks.0"
        patches = [math.isqrt(width // channel_size) for width in widths]
        found = {
            "img_size": math.isqrt(lengths[0]) * patches[0],
            "channel_size": channel_size,
            "patch_sizes": patches,
            "channels": list(channels),
            "blocks": count,
            "layers_per_block": [shared + len(layers) for layers in own],
            "shared_backbone_layers": shared,
            "expansion": tensors[f"{layer}.mlp.main.0.weight"].shape[0] // channels[0],
            "nvp": tensors["blocks.0.proj_out.weight"].shape[0] == 2 * widths[0],
            "num_classes": labels.shape[0] if labels else 0,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise StarflowError(f"{checkpoint} is not a whole iTARFlow: some tensors of a block are missing") from None
    if any(channel_size * patch**2 != width for patch, width in zip(patches, widths, strict=True)):
        raise StarflowError(
            f"{checkpoint}: its tokens hold {widths} numbers, which are no square patches of {channel_size} channels; "
            "give --channel-size"
        )
    if "t1" not in given:
        raise StarflowError(
            f"{checkpoint} does not say the highest noise level of its training; give it, such as --t1 0.3"
        )
    return {**found, **given}


def _size(given: Mapping[str, Any], key: str) -> int | None:
    if key not in given:
        return None
    value = given[key]
    if not isinstance(value, int) or value < 1:
        raise StarflowError(f"{key} must be a whole number of at least 1, not {value!r}")
    return value
