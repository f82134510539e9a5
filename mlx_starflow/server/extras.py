"""What a server offers beside its models: students of them, and a network that enlarges what they make."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_starflow.convert.upscaler_files import find_upscaler
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import NetworkDirectory
from mlx_starflow.pipelines.upscaling import Upscaler
from mlx_starflow.sampling.student import STEPS
from mlx_starflow.server.refusals import Refusal

SCALES = (2, 4)
"""How often images can be asked to be enlarged, as far as the file does."""


@dataclass(frozen=True)
class OfferedStudent:
    """A student that may be asked for.

    Attributes:
        id: what clients call it: the name of its folder.
        path: of the folder, as the server was given it.
        teacher: fingerprint of the weights that it has learned from.
        held: bytes of its weights.
        about: what clients are told.
    """

    id: str
    path: str
    teacher: str
    held: int
    about: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> OfferedStudent:
        """Look at a folder, or at a model's own student. Raises StarflowError if it holds no student."""
        directory = NetworkDirectory.student(folder)
        config, id = directory.config, directory.folder.absolute().name
        about = {
            "id": id,
            "kind": config.kind,
            "steps": STEPS[config.kind],
            "guidance": config.guidance,
            "temperature": config.temperature,
        }
        held = sum(weight.nbytes for weight in directory.weights().values())
        return cls(id, str(folder), config.teacher, held, about)


class Upscaling:
    """The network that enlarges images, read when it is first used.

    Args:
        file: of its weights, as `Upscaler.load` takes it; None: there is none.

    Raises:
        StarflowError: there is no such file, or it cannot be read.

    Attributes:
        scales: how often it enlarges, those of `SCALES` that its file can.
    """

    def __init__(self, file: str | Path | None):
        self.scales: tuple[int, ...] = ()
        self._loaded, self._used = dict[int, Upscaler](), 0.0
        if file is not None:
            found = find_upscaler(file)
            self._path = found.path
            self.scales = tuple(scale for scale in SCALES if scale <= found.network.scale)
            if not self.scales:
                raise StarflowError(f"{file} enlarges by {found.network.scale}, and pictures are asked for by 2 or 4")

    def check(self, scale: int) -> None:
        """Raise Refusal unless images can be enlarged so often."""
        if not self.scales:
            said = "this server enlarges no pictures: leave upscale out, or start it with --upscaler FILE"
        elif scale not in self.scales:
            said = f"this server enlarges by {' or '.join(map(str, self.scales))}, not by {scale}"
        else:
            return
        raise Refusal(400, f"upscale: {said}", code="invalid_value", param="upscale")

    def get(self, scale: int) -> Upscaler:
        """What enlarges so often. Raises Refusal, and StarflowError if its file cannot be read any more."""
        self.check(scale)
        if scale not in self._loaded:
            self._loaded[scale] = Upscaler.load(self._path, scale=scale)
        self._used = time.monotonic()
        return self._loaded[scale]

    def rest(self, before: float) -> None:
        """Let go of it if it was used last before this time, by a monotonic clock."""
        if self._used < before:
            self._loaded.clear()
