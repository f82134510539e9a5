"""A student of a model's flow: pairs of the flow's noise and data are computed, then it learns them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import exists, expanded
from mlx_starflow.media.images import save_image
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.adapters import FINGERPRINT, OF, STUDENT, Strengths
from mlx_starflow.model_dir.directory import NetworkDirectory, load_student
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.model_dir.hub import find_student
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.flow import active_blocks
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.student import KINDS, MATCHING, Student, StudentConfig
from mlx_starflow.sampling.progress import Callback, Watch, watch
from mlx_starflow.training.config import TrainingConfig, TrainingOptions
from mlx_starflow.training.data.batches import split_samples
from mlx_starflow.training.data.pairs.batches import REFINED, PairData
from mlx_starflow.training.finetuning.adapters import AdapterConfig, attach, save_adapter
from mlx_starflow.training.loop.identity import digest
from mlx_starflow.training.loop.objective import Batch
from mlx_starflow.training.loop.reporting import check_reporter
from mlx_starflow.training.loop.student_objective import student_error, student_loss
from mlx_starflow.training.loop.timing import describe_steps, seconds_per_step
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign, trainable
from mlx_starflow.training.output import check_model_output, claim_model
from mlx_starflow.training.recipes.student_network import student_config, student_scales, student_sheet
from mlx_starflow.training.recipes.teacher_pairs import TeacherPairs

TRAINING = TrainingConfig(steps=3000, batch_size=32, lr=5e-4, ema=0.998, watch_every=0)
"""How a student is trained, unless told otherwise."""

ADAPTER_TRAINING = replace(TRAINING, steps=1000, lr=2e-3, ema=0.99)
"""How an adapter of a student is."""

RANK = 16
"""Of an adapter, unless told otherwise."""

MOST_HELD_OUT = 512

SHOWN = 4
"""Held-out pairs on a sheet of samples."""


@dataclass
class NewStudent:
    """A distillation: pairs in `out/pairs`, checkpoints and logs in `out/training`, the student in `out`.

    Or, with `base` and `adapters`, what a student lacks of its teacher's new style: the pairs are of the teacher with
    its adapters, and all that is trained is a LoRA adapter of the student, in `out/adapter`.

    Args:
        model: the teacher: "demo", a model directory or a Hub repository, of prompts or, a TarFlow, of classes.
        out: the folder to write.
        data: captioned images, or a latent cache of them; None: the model's own samples, of `prompts`.
        kind: "inverse" or "matching", see `models.student`.
        pairs: how many, rounded up to whole files of `SHARD`.
        guidance: of the samples that the pairs are; None: with `data` pairs of its images, which have none, else the
            model's own. With `data` and a guidance, the images' captions are the prompts.
        temperature: of the samples' noise; None: the model's own.
        prompts: of the samples; a TarFlow's are its classes unless there are some.
        channels, layers: of the student; None: the width of the flow's widest block, and half of all its layers.
        independent: learn from fresh noise in the place of the flow's: ordinary flow matching, to compare with.
        transport: see `student_loss`.
        base: the folder of a student whose adapter is trained; kind, sizes, guidance and temperature are its own.
        adapters: of the teacher's flow, with their strengths; they go with `base`.
        rank: of the student's adapter; None: `RANK`.
        training: how to train; what is not given is as in `TRAINING`, of an adapter as in `ADAPTER_TRAINING`.
        validation: share of the pairs that is held out, at most `MOST_HELD_OUT` of them.
        report: is told, in a line, what goes on.
    """

    model: str | Path
    out: Path
    data: Path | None = None
    kind: str = KINDS[0]
    pairs: int = 8192
    guidance: float | None = None
    temperature: float | None = None
    prompts: Sequence[str] = ()
    channels: int | None = None
    layers: int | None = None
    independent: bool = False
    transport: float = 0.0
    base: Path | None = None
    adapters: Strengths = ()
    rank: int | None = None
    training: TrainingOptions = field(default_factory=TrainingOptions)
    validation: float = 0.05
    report: Callable[[str], None] = field(default=lambda line: None, repr=False)

    def __post_init__(self) -> None:
        self.out, self.data = Path(self.out), None if self.data is None else expanded(self.data)
        if self.kind not in KINDS:
            raise StarflowError(f"a student is {' or '.join(KINDS)}, not {self.kind!r}")
        if (self.independent or self.transport) and self.kind != MATCHING:
            raise StarflowError("independent noise and transport are for matching students: add --kind matching")
        if not 0 <= self.validation <= 0.5 or not 0 <= self.transport < math.inf:
            raise StarflowError("validation must be in 0..0.5, and transport 0 or more")
        check_reporter(self.training.report_to)
        if (self.base is None) != (not self.adapters):
            raise StarflowError("a style is taught by adapters of the teacher to a student: give --lora and --from")
        if self.base is not None:
            self._take_from_base()
        self.source = TeacherPairs(
            self.model,
            self.out,
            self.data,
            self.pairs,
            self.guidance,
            self.temperature,
            self.prompts,
            self.adapters,
            self.training.seed or 0,
            self.report,
        )
        self.pipe = self.source.pipe

    def _take_from_base(self) -> None:
        """Kind, guidance and temperature of the student that is there. Raises StarflowError if others are asked for."""
        own = NetworkDirectory.student(self.base or "").config
        self.kind = own.kind
        for name in ("guidance", "temperature"):
            asked, learned = getattr(self, name), getattr(own, name)
            if asked not in (None, learned):
                raise StarflowError(f"{self.base} has learned the {name} {learned:g}: leave --{name} out")
        if self.data is None or (own.guidance, own.temperature) != (0.0, 1.0):
            self.guidance, self.temperature = own.guidance, own.temperature

    # ---- the student

    @property
    def adapter_config(self) -> AdapterConfig:
        """Of the student's adapter."""
        return AdapterConfig(rank=self.rank or RANK)

    def _student(self, scales: Sequence[float]) -> Student:
        """The student that is trained: a new one, or the one that is there with a new adapter. Raises StarflowError."""
        if self.base is None:
            config = self.student_config(scales)
            mx.random.seed(self.source.seed)
            student = Student(config)
        else:
            student = load_student(self.base, self.pipe.model, mx.float32)
            attach(student, self.adapter_config, self.source.seed)
        mx.eval(student.parameters())
        return student

    def student_config(self, scales: Sequence[float]) -> StudentConfig:
        """The student's; raises StarflowError if its sizes do not fit together."""
        return student_config(
            self.pipe,
            self.kind,
            scales,
            (self.source.grid.rows, self.source.grid.columns),
            guidance=self.source.settings.guidance,
            temperature=self.source.settings.temperature,
            channels=self.channels,
            layers=self.layers,
        )

    @property
    def _heads(self) -> int:
        return 1 if self.kind == MATCHING else len(active_blocks(self.pipe.flow)) + 1

    def training_config(self) -> TrainingConfig:
        """All settings. Raises StarflowError if they do not fit together."""
        config = self.training.over(TRAINING if self.base is None else ADAPTER_TRAINING)
        every = max(config.steps // 20, 1) if self.training.validate_every is None else config.validate_every
        return replace(config, validate_every=every if self.validation else 0)

    def step_time(self) -> str:
        """How large the student is and how long its training's steps take here; some are done, with random data."""
        student, training = self._student([1.0] * self._heads), self.training_config()
        config, rng = student.config, np.random.default_rng(0)
        shape = (training.batch_size, self.source.grid.rows * self.source.grid.columns, config.in_channels)
        batch: dict[str, np.ndarray] = {name: rng.standard_normal(shape, np.float32) for name in ("noise", "clean")}
        if self.kind == MATCHING:
            batch["time"] = rng.random(shape[0], np.float32)
        else:
            batch["states"] = rng.standard_normal((shape[0], config.states, *shape[1:]), np.float32)
        flow_config = self.pipe.model.flow.config
        if isinstance(flow_config, FlowConfig) and config.txt_dim:
            length = flow_config.txt_size
            batch["condition"] = rng.standard_normal((shape[0], length, config.txt_dim), np.float32)
        elif config.num_classes:
            batch["condition"] = rng.integers(config.num_classes, size=shape[0]).astype(np.int32)
        seconds = seconds_per_step(student, batch, training, self._loss(training))
        return f"{self._size(student)}; {self.source.count} pairs; {describe_steps(seconds, training)}"

    def _loss(self, training: TrainingConfig) -> Callable[[Any, Batch], Any]:
        return partial(
            student_loss,
            grid=(self.source.grid.rows, self.source.grid.columns),
            gradient_checkpointing=training.checkpoint_layers,
            transport=self.transport,
        )

    def run(
        self,
        resume: bool = True,
        begin: Callable[[], None] = lambda: None,
        *,
        progress: Watch = None,
        callback: Callback | None = None,
    ) -> Path:
        """Make the pairs, train, and write the student, or the adapter of one; gives its folder.

        Interrupted, in whatever way, the same call goes on: with the pairs that are there, and from the last
        checkpoint. `begin` is called when all that can be refused has been. Of `progress` the phases are those of
        `build_cache`, "pairs" and "distill".

        Raises:
            StarflowError: `out` holds something else, or is of another distillation, and what `Trainer` raises.
        """
        progress, training = watch(progress, callback), self.training_config()
        student = self._student([1.0] * self._heads)  # its errors come before the pairs
        self._claim()
        folder = self.source.folder(resume, progress)
        fresh = self.source.settings.temperature if self.independent else None
        if self.base is None:
            student = self._student(student_scales(folder, self.kind, fresh, self.source.seed))
        chosen, held_out = split_samples(self.source.count, self.validation, MOST_HELD_OUT, self.source.seed)
        data, held = (
            PairData(folder, part, matching=self.kind == MATCHING, independent=fresh, refined=share)
            for part, share in ((chosen, REFINED), (held_out, 0.0))
        )
        grid = (self.source.grid.rows, self.source.grid.columns)
        shown = folder.read((held_out if len(held_out) else chosen)[:SHOWN])
        trainer = Trainer(
            student,
            data,
            training,
            self.out / "training/student",
            loss=self._loss(training),
            validation=held if len(held_out) else None,
            nll=partial(student_error, grid=grid),
            unit="of the variance",
            constant=0.0,
            samples=partial(student_sheet, self.pipe, pairs=shown),
            identity={
                "student": student.config.to_dict(),
                "pairs": self.source.count,
                "held out": digest(held_out),
                "independent": self.independent,
                "transport": self.transport,
                **self._base_identity(),
            },
            name="distill",
            resume=resume,
            progress=progress,
        )
        self.report(f"{self._size(student)}, {len(chosen)} pairs, {len(held_out)} held out")
        begin()
        assign(student, trainer.run())
        written = self._write(student)
        save_image(student_sheet(self.pipe, student, shown).draw(), self.out / "samples.png")
        self.report(f"wrote {written}; its samples beside its teacher's are in {self.out / 'samples.png'}")
        return written

    def _claim(self) -> None:
        """Raise StarflowError unless `out` may be written."""
        read = [each for each in (self.data, self.base) if each is not None]
        if self.base is None:
            check_model_output(self.out, STUDENT, read, checkpoints="student")
            claim_model(self.out)
            return
        check_outputs(folders=[self.out], inputs=[*read, *(path for path, _ in self.adapters)])
        if exists(self.out / "config.json"):
            raise StarflowError(f"{self.out} holds a model: give another folder for the adapter")

    def _base_identity(self) -> dict[str, Any]:
        """What checkpoints of an adapter are of besides."""
        if self.base is None:
            return {}
        return {"base": fingerprint(find_student(self.base)), "adapter": asdict(self.adapter_config)}

    def _write(self, student: Student) -> Path:
        """Write what has been trained; gives its folder."""
        if self.base is None:
            return save_model(self.out, parameters(student), {"model_type": STUDENT, **student.config.to_dict()})
        about = {"model": str(self.base), OF: STUDENT, FINGERPRINT: fingerprint(find_student(self.base))}
        return save_adapter(self.out / "adapter", student, self.adapter_config, about)

    def _size(self, student: Student) -> str:
        what = "weights" if self.base is None else f"weights of an adapter of {self.base}"
        return f"{sum(weight.size for weight in trainable(student).values()) / 1e6:.1f} M {what}"
