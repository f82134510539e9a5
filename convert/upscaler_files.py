"""Where files of upscalers are found on this machine, and where the published ones are to be had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_starflow.convert.upscalers import UpscalerFile, is_upscaler, open_upscaler
from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import expanded, is_folder, is_regular
from mlx_starflow.model_dir.hub import find_checkpoint, hub_file, upscaler_folder


@dataclass(frozen=True)
class PublishedUpscaler:
    """A file that its authors have published.

    Attributes:
        file: its name.
        scale: how often it enlarges.
        url: where it is to be had.
        licence: of the weights.
        subject: what it is for.
    """

    file: str
    scale: int
    url: str
    licence: str
    subject: str


_REAL_ESRGAN = "https://github.com/xinntao/Real-ESRGAN/releases/download"

PUBLISHED = (
    PublishedUpscaler("RealESRGAN_x4plus.pth", 4, f"{_REAL_ESRGAN}/v0.1.0", "BSD-3-Clause", "photos, the best"),
    PublishedUpscaler("RealESRGAN_x2plus.pth", 2, f"{_REAL_ESRGAN}/v0.2.1", "BSD-3-Clause", "photos, the best"),
    PublishedUpscaler("realesr-general-x4v3.pth", 4, f"{_REAL_ESRGAN}/v0.2.5.0", "BSD-3-Clause", "photos, fast"),
    PublishedUpscaler("realesr-animevideov3.pth", 4, f"{_REAL_ESRGAN}/v0.2.5.0", "BSD-3-Clause", "drawn videos, fast"),
    PublishedUpscaler("RealESRGAN_x4plus_anime_6B.pth", 4, f"{_REAL_ESRGAN}/v0.2.2.4", "BSD-3-Clause", "drawings"),
    PublishedUpscaler("spanx4_ch48.pth", 4, "https://github.com/hongyuanyu/SPAN", "Apache-2.0", "photos, the fastest"),
)
"""The first of a scale is recommended."""


def find_upscaler(name: str | Path | None, scale: int | None = None) -> UpscalerFile:
    """The file of an upscaler.

    Args:
        name: a file; the name of one in `upscaler_folder`; or one on the Hub, owner/name/file, which is downloaded.
            None: what there is in that folder: of those that enlarge so often the one named first in `PUBLISHED`, else
            one that enlarges more.
        scale: how often it is to enlarge, at least; None: whatever the file says.

    Raises:
        StarflowError: there is none, several could be meant, it cannot be read, or enlarges less.
    """
    opened = _named(str(name), scale) if name is not None else _in_folder(scale)
    if scale is not None and opened.network.scale < scale:
        raise StarflowError(f"{opened.path} enlarges by {opened.network.scale}, not by {scale}: {_advice(scale)}")
    return opened


def _named(name: str, scale: int | None) -> UpscalerFile:
    path = expanded(name)
    if is_folder(path):
        raise StarflowError(f"{path} is a folder: give the file in it")
    if is_regular(path):
        return open_upscaler(path)
    folder = upscaler_folder()
    if Path(name).name == name and (
        found := next((each for each in (folder / name, folder / f"{name}.pth") if is_regular(each)), None)
    ):
        return open_upscaler(found)
    if hub_file(name) is not None:
        return open_upscaler(find_checkpoint(name))
    raise StarflowError(f"there is no file {name}, nor one of that name in {folder}: {_advice(scale, named=True)}")


def _in_folder(scale: int | None) -> UpscalerFile:
    folder = upscaler_folder()
    try:
        there = sorted(path for path in folder.iterdir() if is_upscaler(path)) if is_folder(folder) else []
    except OSError as error:
        raise StarflowError(f"cannot read {folder}: {one_line(error)}") from None
    if not there:
        what = "upscaling" if scale is None else f"--upscale {scale}"
        raise StarflowError(f"{what} needs a file of weights, and there is none in {folder}: {_advice(scale)}")
    ranks = {each.file: rank for rank, each in enumerate(PUBLISHED)}
    wanted = scale or 4
    opened = [open_upscaler(path) for path in there]
    fitting = [each for each in opened if each.network.scale == wanted]
    fitting = fitting or [each for each in opened if each.network.scale > wanted or scale is None]
    if not fitting:
        raise StarflowError(f"no file in {folder} enlarges by {wanted}: {_advice(wanted)}")
    known = [each for each in fitting if each.path.name in ranks]
    if not known and len(fitting) > 1:
        names = ", ".join(each.path.name for each in fitting)
        raise StarflowError(f"{folder} holds several upscalers ({names}): name one with --upscale-model")
    return min(known, key=lambda each: ranks[each.path.name]) if known else fitting[0]


def _advice(scale: int | None, named: bool = False) -> str:
    """Which file to get, from where, and where to put it; `named`: whoever reads it has named one already."""
    best = next(each for each in PUBLISHED if each.scale == (scale or 4) or scale not in (None, 2, 4))
    other = "another one" if named else "a file with --upscale-model"
    return (
        f"download {best.url}/{best.file} ({best.licence}) into {upscaler_folder()}, or give {other}; the "
        "documentation's page on upscaling has others"
    )
