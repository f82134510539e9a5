"""A model directory with adapters fused into its weights."""

from __future__ import annotations

from pathlib import Path

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.adapters import Strengths, add_adapters, fuse_adapters
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.fingerprint import FUSED
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.model_dir.saving import copy_parts, save_model
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.model_dir.weights import parameters


def fuse_model(model: str | Path, adapters: Strengths, out: str | Path, *, dequantize: bool = False) -> list[str]:
    """Write a model directory again with adapters fused into its flow.

    Quantized layers that an adapter changes are quantized again with the settings they had, which rounds them anew;
    with `dequantize` they become dense ones, which do exactly what model and adapters did. All others stay as they are.

    Args:
        model: "demo", a model directory or a Hub repository of one.
        adapters: folders with their strengths, see `add_adapters`.
        out: folder to write, made if need be.
        dequantize: see above.

    Returns:
        The paths of the layers that were changed.

    Raises:
        StarflowError: model or adapters cannot be read or do not fit together, or `out` cannot be written or is the
            model's own folder.
    """
    source, out = ModelDirectory.find(model), Path(out)
    if not any(strength for _, strength in adapters):
        raise StarflowError("nothing to fuse: give an adapter and its strength, such as --lora run/adapter 1")
    if out.exists() and out.resolve() == source.path.resolve():
        raise StarflowError(f"{out} is the model's own folder; give another one to write to")
    check_outputs(folders=[out], inputs=[folder for folder, _ in adapters])
    config, flow = dict(source.flow.content), source.flow.lazy()
    read = add_adapters(flow, adapters, source.path)
    changed = fuse_adapters(flow, dequantize=dequantize)
    if not quantized_layers(flow):
        config.pop("quantization", None)
    before = config.get(FUSED, [])
    strengths = zip(read, (float(strength) for _, strength in adapters), strict=True)
    now = [{"adapter": each.digest(), "strength": strength} for each, strength in strengths if strength]
    config[FUSED] = [*(before if isinstance(before, list) else []), *now]
    with transaction(out):
        save_model(out, parameters(flow), config, files=copy_parts(source, out))
    return changed
