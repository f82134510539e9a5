"""The models of a server: loaded when a job needs them, let go of when there is no room or nobody uses them.

All of it happens in the worker's thread, but for the descriptions, which never change but in `loaded`.
"""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.memory import available
from mlx_starflow.likelihood import CalibrationStatistics
from mlx_starflow.model_dir.adapters import Strengths, for_flow_and_student
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.model_dir.hub import OWN_STUDENT
from mlx_starflow.model_dir.weights import parse_dtype
from mlx_starflow.models.tarflow import PixelFlowConfig
from mlx_starflow.pipelines import ClassPipeline, ImagePipeline, Pipeline, VideoPipeline, load
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.pipelines.upscaling import Upscaler
from mlx_starflow.planning.memory import MemoryPlan, plan
from mlx_starflow.server.extras import OfferedStudent, Upscaling
from mlx_starflow.server.refusals import Refusal

AnyPipeline = ImagePipeline | VideoPipeline | ClassPipeline

KINDS: dict[type[Pipeline], str] = {ImagePipeline: "images", VideoPipeline: "videos", ClassPipeline: "classes"}


@dataclass
class Model:
    """A model that may be asked for.

    Attributes:
        id: what clients call it.
        name: what `load` is given.
        about: what clients are told.
        directory: of it.
        pipe: itself, while it is loaded.
        held: bytes of its weights.
        used: when it was used last, by a monotonic clock.
        statistics: of calibration, if there are any.
        students: of it, by their ids.
    """

    id: str
    name: str
    about: dict[str, Any]
    directory: ModelDirectory
    held: int
    pipe: AnyPipeline | None = None
    used: float = 0.0
    statistics: CalibrationStatistics | None = field(default=None, repr=False)
    students: Mapping[str, OfferedStudent] = field(default_factory=dict)

    @property
    def students_held(self) -> int:
        """Bytes of the largest student's weights; one of them is in memory at a time."""
        return max((student.held for student in self.students.values()), default=0)


class Models:
    """Models by their ids.

    Args:
        names: "demo", model directories or repositories; the first one is what is used where a request names none.
        memory: bytes that they, and what they compute, may take; 0: `kernels.memory.available`.
        keep_alive: seconds that a model which nobody uses stays loaded; None: for ever.
        dtype, low_memory, quantize, adapters: as `load` takes them.
        students: folders of students; each belongs to the models that have its teacher's weights.
        upscaler: the file of what enlarges, as `Upscaler.load` takes it; None: nothing does.
    """

    def __init__(
        self,
        names: Sequence[str] = ("demo",),
        *,
        memory: int = 0,
        keep_alive: float | None = None,
        dtype: str | None = None,
        low_memory: bool | None = None,
        quantize: str | None = None,
        adapters: Strengths = (),
        students: Sequence[str | Path] = (),
        upscaler: str | Path | None = None,
    ):
        self.names = list(dict.fromkeys(names)) or ["demo"]
        self.memory, self.keep_alive = memory or available(), keep_alive
        of_flow, of_student = for_flow_and_student(adapters)
        if of_student and not students:
            raise StarflowError(f"{of_student[0][0]} is an adapter of a student: give that with --student DIR")
        self._students = [OfferedStudent.read(each) for each in dict.fromkeys(map(str, students))]
        self.upscaling = Upscaling(upscaler)
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "low_memory": low_memory,
            "quantize": quantize,
            "adapters": of_flow,
            "student_adapters": of_student,
        }
        self._models: dict[str, Model] = {}
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self._plan = lru_cache(256)(self._planned)

    def open(self) -> None:
        """Find all models, and load the first. Raises StarflowError."""
        for name in self.names:
            model = self._found(name)
            if model.id in self._models:
                raise StarflowError(f"two models are called {model.id}: rename one of their folders")
            self._models[model.id] = model
        for student in self._students:
            if not any(student in model.students.values() for model in self._models.values()):
                raise StarflowError(
                    f"the student {student.path} has learned from none of the models here: give its teacher with "
                    "--model"
                )
        self.get(self.default)

    @property
    def default(self) -> str:
        """Id of the model that is used where a request names none."""
        return next(iter(self._models))

    def describe(self) -> list[dict[str, Any]]:
        """What clients are told about all models."""
        return [{**model.about, "loaded": model.pipe is not None} for model in self._models.values()]

    def find(self, id: str | None) -> Model:
        """The model of an id, or the first. Raises Refusal."""
        model = self._models.get(self.default if id is None else id)
        if model is None:
            known = ", ".join(self._models)
            raise Refusal(
                404, f"there is no model {str(id)[:100]!r} here: {known}", code="model_not_found", param="model"
            )
        return model

    def student(self, model: Model, id: str) -> str:
        """The folder of a model's student of this id. Raises Refusal."""
        found = model.students.get(id)
        if found is None:
            known = ", ".join(model.students) or "it has none (mlx-starflow serve --student DIR)"
            raise Refusal(
                404, f"{model.id} has no student {id[:100]!r} here: {known}", code="student_not_found", param="student"
            )
        return found.path

    @property
    def loaded(self) -> int:
        """How many are loaded."""
        return len(self._loaded)

    # ---- in the worker's thread

    def get(self, id: str | None) -> AnyPipeline:
        """The model of an id, loaded; others make room for it. Raises StarflowError, Refusal."""
        model = self.find(id)
        if model.pipe is None:
            self._make_room(model)
            model.pipe = load(model.name, **self._options)
        self._loaded[model.id] = model
        self._loaded.move_to_end(model.id)
        model.used = time.monotonic()
        return model.pipe

    def rest(self) -> None:
        """Let go of what nobody has used for long."""
        if self.keep_alive is None:
            return
        now = time.monotonic()
        self.upscaling.rest(now - self.keep_alive)
        for model in [each for each in self._loaded.values() if now - each.used > self.keep_alive]:
            self._let_go(model)

    def check_room(self, model: Model, size: tuple[int, int], batch: int, guided: bool, frames: int | None) -> None:
        """Raise StarflowError, with the figure, if this takes more memory than the server may use; else make room."""
        if model.about["kind"] == "classes":
            return
        needed = self._plan(model.id, size, batch, guided, frames).peak(
            bool(model.pipe and model.pipe.backend.low_memory)
        )
        needed += model.students_held
        if needed > self.memory:
            what = f"{size[0]}x{size[1]}" + (f", {batch} at a time," if batch > 1 else "")
            raise StarflowError(
                f"{what} would take {needed / 1e9:.1f} GB of memory, and the server may use {self.memory / 1e9:.1f}: "
                "ask for a smaller size, or for fewer pictures"
            )
        self._make_room(model, needed)

    def upscaler(self, model: Model, scale: int, size: tuple[int, int]) -> Upscaler:
        """What enlarges images of a size (width, height), for which others than their model make room.

        Raises Refusal, or StarflowError if that takes more memory than the server may use.
        """
        upscaler = self.upscaling.get(scale)
        needed = upscaler.memory(size)
        if needed > self.memory:
            raise StarflowError(
                f"to enlarge {size[0]}x{size[1]} by {scale} would take {needed / 1e9:.1f} GB of memory, and the server "
                f"may use {self.memory / 1e9:.1f}: ask for a smaller size, or leave upscale out"
            )
        self._make_room(model, model.held + needed)
        return upscaler

    def _planned(self, id: str, size: tuple[int, int], batch: int, guided: bool, frames: int | None) -> MemoryPlan:
        return plan(
            self._models[id].directory,
            size=size,
            batch=batch,
            frames=frames,
            guidance=float(guided),
            dtype=parse_dtype(self._options["dtype"]),
            quantization=self._options["quantize"],
        )

    def _make_room(self, model: Model, needed: int | None = None) -> None:
        """Let go of others, the least recently used first, until `needed` bytes fit beside those that stay."""
        needed = model.held if needed is None else needed
        others = [each for each in self._loaded.values() if each is not model]
        while others and sum(each.held for each in others) + needed > self.memory:
            self._let_go(others.pop(0))

    def _let_go(self, model: Model) -> None:
        model.pipe = None
        self._loaded.pop(model.id, None)
        gc.collect()
        mx.clear_cache()

    def _found(self, name: str) -> Model:
        directory = ModelDirectory.find(name)
        config = directory.flow.config
        backend = MLXBackend(directory, dtype=parse_dtype(self._options["dtype"]), quantize=self._options["quantize"])
        of_labels = isinstance(config, PixelFlowConfig)
        of_videos = not isinstance(config, PixelFlowConfig) and config.vid_size
        kind = ClassPipeline if of_labels else VideoPipeline if of_videos else ImagePipeline
        pipe: AnyPipeline = kind(name, directory, backend)  # its networks are read when they are first used
        statistics = CalibrationStatistics.find(directory.path)
        if isinstance(pipe, ClassPipeline):
            held = sum(weight.nbytes for weight in directory.flow.weights().values())
        else:
            held = sum(plan(directory, dtype=parse_dtype(self._options["dtype"])).weights.values())
        id = Path(name).name if "/" in name and Path(name).is_dir() else name
        students = self._taught_by(name, directory)
        about: dict[str, Any] = {
            "id": id,
            "kind": KINDS[kind],
            "size": list(pipe.settings.size or pipe.size),
            "step": _step(pipe),
            "blocks": len(pipe.config.blocks) if not isinstance(pipe, ClassPipeline) else pipe.config.blocks,
            "settings": pipe.settings.to_dict(),
            "classes": list(pipe.classes) if isinstance(pipe, ClassPipeline) else [],
            "calibrated": sorted(statistics.nll) if statistics is not None else [],
            "unit": f"nats per {pipe.dimension}",
            "students": [student.about for student in students.values()],
        }
        model = Model(id, name, about, directory, held, statistics=statistics, students=students)
        model.held += model.students_held
        return model

    def _taught_by(self, name: str, directory: ModelDirectory) -> dict[str, OfferedStudent]:
        """The students of a model, by id: its own, and those that the server was given.

        Raises StarflowError if two have the same.
        """
        students = list(self._students)
        if directory.has(OWN_STUDENT) and (own := OfferedStudent.read(name)) not in students:
            students.insert(0, own)
        if not students:
            return {}
        mark, found = fingerprint(directory.path), dict[str, OfferedStudent]()
        for student in students:
            if student.teacher != mark:
                continue
            if student.id in found:
                raise StarflowError(f"two students are called {student.id}: rename one of their folders")
            found[student.id] = student
        return found


def _step(pipe: AnyPipeline) -> int:
    """Pixels that sides are multiples of; 0 where there is one size alone."""
    return 0 if isinstance(pipe, ClassPipeline) else pipe.vae_config.downscale * pipe.config.patch_size
