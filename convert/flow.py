"""Official flow checkpoints (apple/ml-starflow, apple/ml-tarflow) to model directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlx_starflow.convert.common import Tensor, check_target, open_tensors, write_module
from mlx_starflow.errors import StarflowError
from mlx_starflow.models.starflow import official_arguments
from mlx_starflow.weights import flow_module, one_line, parse_dtype

LICENSE = (
    "STARFlow weights that Apple released are for research purposes only: Apple Machine Learning Research Model is "
    "licensed under the Apple Machine Learning Research Model License Agreement (LICENSE_MODEL of "
    "github.com/apple/ml-starflow)."
)
"""What whoever gets converted official weights has to be told."""

_NOTICE = """\
{license}
Whoever passes them on passes on that agreement and this notice with them.

Changes: {checkpoint} was converted to MLX by `mlx-starflow convert flow`. Buffers that hold no weights were left out;
the weights were {changes}.

None of this holds for weights that someone else trained and released under other terms.
"""


def convert_flow(
    checkpoint: str | Path,
    config: str | Path,
    out_dir: str | Path,
    *,
    quantize: int | str | None = None,
    dtype: str | mx.Dtype | None = None,
) -> Path:
    """Write an official checkpoint of a STARFlow or a TarFlow as a model directory.

    Tensors are read, quantized and written one at a time: memory for the largest is enough. Which flow it is shows in
    its tensors: a TarFlow has learned positions. Where the YAML does not say how wide the text embeddings are, the
    checkpoint does.

    Args:
        checkpoint: the official `.pth`, or its tensors as `.safetensors`.
        config: the official YAML of its arguments.
        out_dir: folder to write, made if need be: `config.json`, `model*.safetensors` and `NOTICE`, which names the
            licence of Apple's weights. A flow that it holds is replaced.
        quantize: 8, 6 or 4 bits, "mxfp8", "mxfp4" or "nvfp4"; None leaves the weights as they are.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.

    Returns:
        `out_dir`.

    Raises:
        StarflowError: a file is missing or damaged, config and checkpoint do not belong together, or `out_dir` cannot
            be written or holds another kind of model.
    """
    checkpoint, config, out_dir = Path(checkpoint), Path(config), Path(out_dir)
    dtype = parse_dtype(dtype)
    check_target(checkpoint.parent, out_dir)
    arguments = _read_arguments(config)
    tensors = open_tensors(checkpoint)
    model_type = "tarflow" if any(name.endswith(".pos_embed") for name in tensors) else "starflow"
    module, network, config_class = flow_module(model_type)
    tensors = module.sanitize(tensors)
    if model_type == "starflow" and arguments.get("txt_size") and "txt_dim" not in arguments:
        arguments["txt_dim"] = _text_width(tensors, arguments, checkpoint)
    try:
        flow_config = config_class.from_official(arguments)
        flow = network(flow_config)
    except (StarflowError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise StarflowError(f"{config}: {one_line(error)}") from error
    changes = [f"cast to {str(dtype).rpartition('.')[2]}"] * (dtype is not None)
    changes += [f"quantized ({quantize})"] * (quantize is not None)
    notice = _NOTICE.format(
        license=LICENSE, checkpoint=checkpoint.name, changes=" and ".join(changes) or "kept as they were"
    )
    return write_module(
        out_dir,
        flow,
        tensors,
        {"model_type": model_type, **flow_config.to_dict()},
        source=checkpoint,
        dtype=dtype,
        quantize=quantize,
        files={"NOTICE": notice.encode()},
    )


def _read_arguments(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StarflowError(f"cannot read {path}: {one_line(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StarflowError(f"{path} is not valid YAML: {one_line(error)}") from error
    try:
        return official_arguments(content)
    except (AttributeError, TypeError):
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
