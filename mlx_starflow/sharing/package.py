"""What is published of a folder: a model directory's networks and licences, or an adapter; and nothing else of it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_starflow.convert.official import LICENSE, RELEASES
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.files import exists, expanded, is_folder, is_regular, read_json, read_text
from mlx_starflow.media.image_files import read_image
from mlx_starflow.media.images import grid
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.files import CLASSES_FILE, STATISTICS_FILE
from mlx_starflow.model_dir.hub import OWN_STUDENT, find_model, is_repository
from mlx_starflow.pipelines import load
from mlx_starflow.planning.summary import PARTS
from mlx_starflow.sampling.progress import Callback, Watch

CARD, SAMPLES = "README.md", "samples.png"

GRIDS = (SAMPLES, "grid.png")
"""Samples that trainings leave: in the model's folder, or in that of the run that an adapter is of."""

AGREEMENT = "Apple Machine Learning Research Model"
"""What the notices of weights that are Apple's, or made of them, name."""

MOST_NOTICE = 1 << 20
"""Bytes of a licence."""


@dataclass(frozen=True)
class Package:
    """What is published.

    Attributes:
        folder: where it is: a model directory, or an adapter's folder.
        model: the model; None: it is an adapter.
        adapter: the adapter; None: it is a model.
        files: what is sent besides the card, by name: a file, or what it holds.
        notices: the texts of licences and notices, by name.
        prompts: what the samples show, in their order.
        card: the text of the card, if there is one in the folder already.
    """

    folder: Path
    model: ModelDirectory | None
    adapter: Adapter | None
    files: dict[str, Path | bytes]
    notices: dict[str, str]
    prompts: list[str] = field(default_factory=list)
    card: str | None = None

    @property
    def run(self) -> Path:
        """The folder of the training that it is of, as far as there is one."""
        return self.folder.parent

    @property
    def base(self) -> str | None:
        """The model that an adapter was trained on: a name that says nothing of this machine's folders."""
        name = self.adapter.config.get("model") if self.adapter else None
        return public_name(name) if isinstance(name, str) and name else None

    @property
    def is_apples(self) -> bool:
        """Whether Apple's agreement holds: for converted weights, and for all that is trained on them."""
        return any(AGREEMENT in text for text in self.notices.values()) or (self.base or "").lower() in RELEASES

    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in self.files.values())


def public_name(model: str) -> str:
    """A model's name as others know it: of a folder on this machine only its own name."""
    return model if is_repository(model) and not is_folder(expanded(model)) else Path(model).name


@checked
def pack(
    folder: str | Path,
    *,
    prompts: Sequence[str] = (),
    seed: int = 0,
    accepts_agreement: bool = False,
    progress: Watch = False,
    callback: Callback | None = None,
) -> Package:
    """Find out what is to be published of a folder.

    Args:
        folder: "demo", a model directory, an adapter's folder, or the run of a fine-tuning that holds one of these.
        prompts: make a grid of samples for these; without any, the one that the training left is taken.
        seed: of the first sample.
        accepts_agreement: whoever publishes has read Apple's agreement, if it holds.
        progress, callback: of the samples, see `Progress`.

    Raises:
        StarflowError: there is neither a model nor an adapter, a file is missing or damaged, or Apple's agreement
            holds and is not accepted.
    """
    found = _open(folder)
    if found.is_apples and not accepts_agreement:
        raise StarflowError(
            f"{found.folder} holds weights that are Apple's, or made of them: {LICENSE} If that agreement lets you "
            "publish them, give --i-have-read-the-licence"
        )
    shown = list(prompts)
    picture: bytes | None = None
    if shown and found.model is not None and found.model.flow.content.get("vid_size"):
        raise StarflowError("samples are pictures, and this is a model of videos: leave the prompts out")
    if shown:
        with_adapter = [(found.folder, 1.0)] if found.adapter else []
        model = found.adapter.config.get("model") if found.adapter else str(found.folder)
        pipe = load(str(model), adapters=with_adapter)
        made = pipe.generate(shown, seed=seed, verify=False, progress=progress, callback=callback)
        picture = _png(grid(made.images))
    elif left := next((path for path in _grids(found) if is_regular(path)), None):
        picture, shown = _png(read_image(left)), _shown(left)
    files = dict(found.files)
    if picture is not None:
        files[SAMPLES] = picture
    return Package(found.folder, found.model, found.adapter, files, found.notices, shown, found.card)


def _open(folder: str | Path) -> Package:
    """The package without samples."""
    path = expanded(folder)
    if str(folder) != "demo":
        if not is_folder(path):
            raise StarflowError(f"{path} is not a folder: give a model directory, or an adapter's folder")
        if not exists(path / "config.json") and not exists(path / CONFIG_FILE):
            path = next((path / part for part in ("adapter", "model") if is_folder(path / part)), path)
    if exists(path / CONFIG_FILE):
        return _adapter(path)
    if str(folder) != "demo" and not exists(path / "config.json"):
        raise StarflowError(f"{path} holds neither a model's config.json nor an adapter's {CONFIG_FILE}")
    model = ModelDirectory(find_model("demo" if str(folder) == "demo" else path))
    model.flow.config  # noqa: B018 - a config that cannot be read is a mistake
    files: dict[str, Path | bytes] = {
        name: model.path / name for name in _files(model.path, "", CLASSES_FILE, STATISTICS_FILE, *model.licences)
    }
    for part in (*PARTS.values(), OWN_STUDENT):
        if model.has(part):
            files |= {name: model.path / name for name in _files(model.path, part, "spiece.model")}
    notices = {name: read_text(model.path / name, most=MOST_NOTICE) for name in model.licences}
    return Package(model.path, model, None, files, notices, card=_card(model.path))


def _adapter(folder: Path) -> Package:
    adapter = Adapter.read(folder)
    if adapter.of_student:
        raise StarflowError(f"{folder} is an adapter of a student: what is published are models, and adapters of them")
    config: dict[str, Any] = dict(adapter.config)
    if isinstance(config.get("model"), str):
        config["model"] = public_name(config["model"])
    files: dict[str, Path | bytes] = {
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS_FILE: folder / WEIGHTS_FILE,
    }
    notices = {}
    try:
        base = ModelDirectory(find_model(str(adapter.config.get("model")), download=False))
        notices = {name: read_text(base.path / name, most=MOST_NOTICE) for name in base.licences}
        files |= {name: base.path / name for name in base.licences}
    except StarflowError:  # the base is not here any more
        pass
    return Package(folder, None, adapter, files, notices, card=_card(folder))


def _files(root: Path, part: str, *others: str) -> Iterator[str]:
    """Names of a network's files, and of others as far as they are there."""
    folder = root / part
    for path in sorted(folder.iterdir()):
        weights = path.name.startswith("model") and path.name.endswith((".safetensors", ".safetensors.index.json"))
        if is_regular(path) and (path.name == "config.json" or weights or path.name in others):
            yield f"{part}/{path.name}" if part else path.name


def _grids(package: Package) -> Iterator[Path]:
    """Where a training may have left samples of this."""
    own = [package.folder / name for name in GRIDS]
    of_run = [package.run / name for name in GRIDS] if exists(package.run / "report.json") else []
    yield from (*own, *of_run)


def _shown(picture: Path) -> list[str]:
    """The prompts that a picture says it was made of."""
    try:
        prompts = read_metadata(picture).get("prompts")
    except StarflowError:
        return []
    return [str(each) for each in prompts] if isinstance(prompts, list) else []


def _png(image: Image.Image) -> bytes:
    """A picture without what its file may say besides, such as where the model lies."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def _card(folder: Path) -> str | None:
    return read_text(folder / CARD) if is_regular(folder / CARD) else None


def read_report(package: Package) -> dict[str, Any]:
    """The likelihood before and after a fine-tuning, as its `report.json` has it; {} where there is none."""
    path = package.run / "report.json"
    return read_json(path) if is_regular(path) else {}
