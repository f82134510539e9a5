"""A whole official release to one model directory: flow, text encoder and autoencoder, downloaded where need be."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx

from mlx_starflow.convert.flow import read_arguments, write_flow
from mlx_starflow.convert.official import LICENSE, LICENSES, RELEASES, later_scale, released_arguments
from mlx_starflow.convert.t5 import convert_t5
from mlx_starflow.convert.vae import convert_vae
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.files import exists, read_json, replacing
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.files import read_index
from mlx_starflow.model_dir.hub import converted_directory, fetch
from mlx_starflow.model_dir.quantization import QUANTIZATIONS
from mlx_starflow.model_dir.transaction import locked, transaction
from mlx_starflow.model_dir.weights import parse_dtype
from mlx_starflow.models.t5 import encoder_name

_RECORD = "conversion.json"


@checked
def convert_release(
    repository: str,
    out_dir: str | Path | None = None,
    *,
    quantize: int | str | None = None,
    dtype: str | mx.Dtype | None = None,
    checkpoint: str | Path | None = None,
    config: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a release's flow, text encoder and autoencoder as one model directory.

    Parts that are not given are downloaded into Hugging Face's cache. The text encoder comes first and the flow last:
    until everything is there, `load` refuses the directory or, if it holds a model already, reads that one. A part that
    is complete, and was made with the same settings, is not made again, so a run that was interrupted can simply be
    repeated.

    Args:
        repository: "apple/starflow", or "apple/starflow-v" for the video model, which is in the same repository.
        out_dir: folder to write; None: the one in which `load` finds the model by that name, in
            `~/.cache/mlx-starflow` or the folder that the environment variable MLX_STARFLOW_CACHE names.
        quantize: the flow's weights: 8, 6 or 4 bits, "mxfp8", "mxfp4" or "nvfp4".
        dtype: "float32", "bfloat16" or "float16", of all parts. None keeps the flow's and the autoencoder's, and makes
            the text encoder bfloat16, half of its size.
        checkpoint: the flow's checkpoint, as `convert_flow` takes it.
        config: the YAML of the flow's arguments; None: the released one's.
        text_encoder: a Hugging Face T5's folder.
        vae: the folder of a diffusers AutoencoderKL or, of the video model, AutoencoderKLWan, or a checkpoint of one,
            such as `Wan2.2_VAE.pth` (see `convert_vae`).
        report: is told the licence of the flow's weights, and then what is being done, a line at a time.

    Returns:
        `out_dir`.

    Raises:
        StarflowError: the release is unknown, a part cannot be downloaded or converted, or `out_dir` cannot be written.
    """
    if (release := RELEASES.get(repository.lower())) is None:
        raise StarflowError(
            f"unknown release {repository!r}: it must be {', '.join(RELEASES)}; "
            f"of others name the file: mlx-starflow convert {repository}/FILE.pth -o DIR (mlx-starflow convert --help)"
        )
    if quantize is not None and str(quantize) not in QUANTIZATIONS:
        raise StarflowError(f"cannot quantize to {quantize!r}; it must be one of {', '.join(QUANTIZATIONS)}")
    dtype = parse_dtype(dtype)
    for given in (checkpoint, config, text_encoder, vae):
        if given is not None and not exists(Path(given)):
            raise StarflowError(f"{given} does not exist; leave it out to download the release's own")
    flow_name = Path(checkpoint or release.checkpoint)
    arguments = read_arguments(flow_name, config) or released_arguments(Path(release.checkpoint)) or {}
    known = {name: released_arguments(Path(other.checkpoint)) or {} for name, other in RELEASES.items()}
    kinds = {name: bool(its.get("vid_size")) for name, its in known.items()}
    if (is_video := bool(arguments.get("vid_size"))) != kinds[repository.lower()]:
        other = next(name for name, kind in kinds.items() if kind == is_video)
        what = "a video model's" if is_video else "a picture model's"
        raise StarflowError(f"{config or flow_name} is {what}; convert it with: mlx-starflow convert {other}")
    factor = later_scale(str(arguments.get("vae") or release.vae)) if is_video else None
    directory = converted_directory(repository) if out_dir is None else Path(out_dir)
    files = [part for part in (checkpoint, text_encoder, vae) if part is not None]
    check_outputs(folders=[directory, directory / "text_encoder", directory / "vae"], inputs=files)
    text_dtype = dtype or mx.bfloat16
    sources = {
        "text_encoder": str(text_encoder or release.text_encoder),
        "vae": str(vae or release.vae_repository),
        "flow": str(checkpoint or f"{release.repository}/{release.checkpoint}"),
    }

    def make_text_encoder() -> None:
        source = text_encoder or _fetch_text_encoder(release.text_encoder)
        convert_t5(source, directory / "text_encoder", dtype=text_dtype)

    def make_vae() -> None:
        source = vae or _fetch_vae(release.vae_repository, release.vae_folder)
        convert_vae(source, directory / "vae", dtype=dtype, later_scale=factor)

    def make_flow() -> None:
        source = Path(checkpoint or _fetch_checkpoint(release.repository, release.checkpoint))
        others = [_origin(part, sources[part]) for part in ("text_encoder", "vae")]
        write_flow(
            source,
            arguments,
            directory,
            quantize,
            dtype,
            config or source,
            pipeline=release.pipeline,
            other_parts=" ".join(others),
        )

    vae_settings = {"dtype": _name(dtype), **({"later_scale": factor} if is_video else {})}
    flow_settings = {"dtype": _name(dtype), "quantize": quantize and str(quantize), "config": config and str(config)}
    parts: list[tuple[str, Path, dict[str, Any], Callable[[], None]]] = [
        ("text_encoder", directory / "text_encoder", {"dtype": _name(text_dtype)}, make_text_encoder),
        ("vae", directory / "vae", vae_settings, make_vae),
        ("flow", directory, flow_settings, make_flow),
    ]
    report(LICENSE)
    with locked(directory), ExitStack() as stack:
        # Parts of a new model take their places one by one; where there is a model already, all wait for the last.
        new = None
        if (directory / "config.json").is_file():
            new = stack.enter_context(transaction(directory, resume=True))
        record, begun = _read_record(directory), _read_record(new.staged("")) if new else {}
        for part, folder, settings, make in parts:
            settings = {"source": sources[part], **settings}
            inside = "" if folder == directory else folder.name
            if new and begun.get(part) == settings and (new.staged(inside) / "config.json").is_file():
                new.keep(inside)
                report(f"{part}: complete in {folder}")
            elif (folder / "config.json").is_file() and record.get(part, settings) == settings:
                report(f"{part}: complete in {folder}")
                continue
            else:
                report(f"{part}: from {sources[part]}")
                make()
            record[part] = settings
            _write_record(new.file(_RECORD) if new else directory / _RECORD, record)
    return directory


def _name(dtype: mx.Dtype | None) -> str | None:
    return None if dtype is None else str(dtype).rpartition(".")[2]


def _origin(part: str, source: str) -> str:
    """Where a part beside the flow is from, for NOTICE."""
    if source in LICENSES:
        return f"The folder {part} holds {source} ({LICENSES[source]}), converted likewise."
    return f"The folder {part} holds {Path(source).name}, converted likewise; its own licence applies."


# ---- which parts are there


def _read_record(directory: Path) -> dict[str, Any]:
    """From what, and with which settings, each part was made."""
    path = directory / _RECORD
    return read_json(path) if path.is_file() else {}


def _write_record(path: Path, record: dict[str, Any]) -> None:
    with replacing(path, failure=f"cannot write {path}") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# ---- downloads: only the files that are converted


def _fetch_text_encoder(repository: str) -> Path:
    weights = ("model.safetensors", "pytorch_model.bin")
    folder = fetch(repository, ["config.json", "spiece.model", *(f"{name}.index.json" for name in weights)])
    for name in weights:
        index = folder / f"{name}.index.json"
        files = [name]
        if index.is_file():
            # Shards that hold the decoder alone need not be there.
            files = sorted({file for tensor, file in read_index(index).items() if encoder_name(tensor)})
        folder = fetch(repository, files, revision=folder.name)
        if all((folder / file).is_file() for file in files):
            return folder
    raise _no_file(repository, "model.safetensors")


def _fetch_vae(repository: str, subfolder: str) -> Path:
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        inside = PurePosixPath(subfolder)
        folder = fetch(repository, [str(inside / "config.json"), str(inside / name)]) / subfolder
        if (folder / name).is_file():
            return folder
    raise _no_file(repository, "diffusion_pytorch_model.safetensors")


def _fetch_checkpoint(repository: str, name: str) -> Path:
    found = sorted(fetch(repository, [name, f"*/{name}"]).rglob(name))
    if not found:
        raise _no_file(repository, name)
    return found[0]


def _no_file(repository: str, name: str) -> StarflowError:
    return StarflowError(f"{repository} on the Hub has no file {name}; give a local copy instead")
