"""A model directory with adapters fused into its weights."""

from __future__ import annotations

from pathlib import Path

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.requantize import LICENCES
from mlx_starflow.model_dir.adapters import Strengths, add_adapters, fuse_adapters
from mlx_starflow.model_dir.hub import find_model
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import load_weights, new_flow, one_line, parameters, place_weights, read_config


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
    directory, out = find_model(model), Path(out)
    if not any(strength for _, strength in adapters):
        raise StarflowError("nothing to fuse: give an adapter and its strength, such as --lora run/adapter 1")
    if out.exists() and out.resolve() == directory.resolve():
        raise StarflowError(f"{out} is the model's own folder; give another one to write to")
    config = read_config(directory)
    flow = new_flow(directory, config)
    place_weights(flow, load_weights(directory), directory, quantization=config.get("quantization"))
    add_adapters(flow, adapters)
    changed = fuse_adapters(flow, dequantize=dequantize)
    if not quantized_layers(flow):
        config.pop("quantization", None)
    # The flow last: without its config.json this is not yet a model.
    save_model(out, parameters(flow), config, files=copy_parts(directory, out))
    return changed


def copy_parts(directory: Path, out: Path) -> dict[str, bytes]:
    """Copy a model's text encoder and autoencoder, as far as it has them; returns its licences, by name.

    Raises StarflowError if something cannot be read or written.
    """
    for part, names in (("text_encoder", ("spiece.model",)), ("vae", ())):
        if (directory / part / "config.json").is_file():
            folder = directory / part
            save_model(out / part, load_weights(folder), read_config(folder), files=_files(folder, *names))
    licences = [path.name for path in directory.iterdir() if path.is_file() and path.stem.upper() in LICENCES]
    return _files(directory, *licences)


def _files(directory: Path, *names: str) -> dict[str, bytes]:
    try:
        return {name: (directory / name).read_bytes() for name in names}
    except OSError as error:
        raise StarflowError(f"cannot read {directory}: {one_line(error)}") from error
