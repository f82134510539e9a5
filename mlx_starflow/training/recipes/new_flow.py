"""A new flow from a config file: a STARFlow over a model's latents, or a TarFlow or an iTARFlow over pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.memory import available
from mlx_starflow.media.files import expanded, is_folder
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.media.images import save_image
from mlx_starflow.media.sources import open_source, write_skips
from mlx_starflow.model_dir.directory import FLOWS, ModelDirectory
from mlx_starflow.model_dir.files import CLASSES_FILE
from mlx_starflow.model_dir.quantization import dequantize_module
from mlx_starflow.model_dir.saving import copy_parts, save_model
from mlx_starflow.model_dir.transaction import PARTS, transaction
from mlx_starflow.model_dir.weights import check_shapes, parameters
from mlx_starflow.models.configs import FLOW
from mlx_starflow.models.itarflow import ITarFlowConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.tarflow import PixelFlow, PixelFlowConfig, TarFlowConfig
from mlx_starflow.planning.finetune_memory import BATCH_SIZES, Choice, Planner
from mlx_starflow.planning.limits import check_held, check_side
from mlx_starflow.sampling.progress import Callback, Progress, Watch, watch
from mlx_starflow.training.config import MOMENTS, TrainingConfig, TrainingOptions
from mlx_starflow.training.data.batches import IndexedData, split_samples
from mlx_starflow.training.data.cache.build import CacheSettings, build_cache
from mlx_starflow.training.data.cache.files import is_cache
from mlx_starflow.training.data.cache.model import CacheModel, check_model, weights_digest
from mlx_starflow.training.data.cache.reading import CAPTIONED, CachedLatents, LatentCache
from mlx_starflow.training.data.labelled_images import LabelledImages, level_arrays
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.identity import Identity, digest
from mlx_starflow.training.loop.reporting import check_reporter
from mlx_starflow.training.loop.samples import caption_drawer, class_sheet, first_captions
from mlx_starflow.training.loop.timing import describe_steps, random_batch, seconds_per_step
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.watch import SampleSheet
from mlx_starflow.training.loop.weights import assign
from mlx_starflow.training.output import check_model_output, claim_model
from mlx_starflow.training.recipes.flow_config import FROM_ENCODERS
from mlx_starflow.training.recipes.presets import PIXEL_FLOWS

Prepared = tuple[IndexedData, IndexedData | None, Callable[[Any], SampleSheet]]
"""What a flow is trained on, what it is measured with, and what draws samples of it."""

STEPS = 10000
"""Of a training, if nobody says."""

MOST_HELD_OUT = 100


@dataclass
class NewFlow:
    """A training of a flow from nothing, or from the weights of another one.

    Args:
        data: for a STARFlow a latent cache, or captioned images, of which one is made in `out/training/cache`; for a
            TarFlow or an iTARFlow images, whose captions (or folders) are their classes.
        out: the model directory to write; checkpoints and logs are in `out/training`.
        config: as `read_flow_config` gives it. What follows from the data may be left out: a STARFlow's
            `FROM_ENCODERS`, a TarFlow's `num_classes`.
        training: how to train; `batch_size` and `checkpoint_layers`, if not given, are chosen by memory.
        encoders: the model whose autoencoder and text encoder a STARFlow uses: "demo", a model directory or a Hub
            repository of one; None: those of `init` if it has some, else "demo".
        validation: share of the images that is held out, at most 100 of them.
        caption: of images that have none.
        report: is told, in a line, what goes on.
        init: the model whose flow's weights it begins with, see `flow_config_of`; None: random ones. A flow over pixels
            with other classes learns their embeddings anew.
    """

    data: Path
    out: Path
    config: Mapping[str, Any]
    training: TrainingOptions = field(default_factory=TrainingOptions)
    encoders: str | None = None
    validation: float = 0.1
    report: Callable[[str], None] = field(default=lambda line: None, repr=False)
    init: str | Path | None = None
    caption: str | None = None

    def __post_init__(self) -> None:
        self.data, self.out = expanded(self.data), Path(self.out)
        if not 0 <= self.validation <= 0.5:
            raise StarflowError(f"train: validation must be in 0..0.5, not {self.validation}")
        if not 0 <= self.seed < 2**63:
            raise StarflowError(f"train: the seed must be 0 or more and less than 2^63, not {self.seed}")
        if self.training.patience and not self.validation:
            raise StarflowError("train: --patience needs pictures to validate on: leave out --validation 0")
        if self.caption is not None and self.has_cache:
            raise StarflowError(CAPTIONED.format(self.data))
        self.group = distributed.world()
        self._progress: Watch = None
        self._init = None if self.init is None else ModelDirectory.find(self.init)
        check_reporter(self.training.report_to)

    @property
    def work(self) -> Path:
        return self.out / "training"

    @property
    def encoder_model(self) -> str:
        """The model whose encoders a STARFlow uses."""
        if self.encoders is not None:
            return self.encoders
        own = self._init is not None and all(is_folder(self._init.path / part) for part in PARTS)
        return str(self.init) if own else "demo"

    @property
    def is_pixels(self) -> bool:
        return self.config["model_type"] in PIXEL_FLOWS

    @property
    def _has_levels(self) -> bool:
        return bool(self.config["model_type"] == "itarflow")

    # ---- data

    @property
    def has_cache(self) -> bool:
        return is_cache(self.data)

    @cached_property
    def cache(self) -> LatentCache:
        """The data's latents; of images, they are made by rank 0."""
        folder = self.data
        if not self.has_cache:
            folder = self.work / "cache"

            watched = self._progress

            def build() -> None:
                open_source(self.data, caption=self.caption)
                settings = CacheSettings(caption=self.caption)
                for line in build_cache(self.data, folder, self.encoder_model, settings, progress=watched).remarks():
                    self.report(line)

            distributed.first_does(build, "train")
        cache = LatentCache(folder)
        check_model(cache.identity, self.encoder_model, folder, "; or give --encoders the model that it was made with")
        return cache

    @cached_property
    def folder(self) -> ImageFolder:
        """The data's images."""
        size: int = FLOW.typed("img_size", "int", self.config.get("img_size", 32))
        check_side((size, size))
        check_held(2, 3 * size * size)  # two are the least that a training needs
        return ImageFolder.read(self.data, size=size, splits=("train",), caption=self.caption)

    @cached_property
    def images(self) -> LabelledImages:
        """The data's images with their classes."""
        config = self.config
        lowest = FLOW.typed("t0", "float", config.get("t0", ITarFlowConfig.t0))
        highest = FLOW.typed("t1", "float", config.get("t1", ITarFlowConfig.t1))
        return LabelledImages.of(self.folder, levels=(lowest, highest) if self._has_levels else None)

    def _latents(self) -> Prepared:
        chosen, held_out = split_samples(len(self.cache), self.validation, MOST_HELD_OUT, self.seed)
        patch = self.flow_config.patch_size
        for height, width, _ in self.cache.shapes:
            if height % patch or width % patch:
                raise StarflowError(f"the config's patch_size {patch} does not divide latents of {height}x{width}")
        data, validation = (CachedLatents(self.cache, part, patch) for part in (chosen, held_out))
        if not len(held_out):
            return data, None, self._drawer(data)
        return data, validation, self._drawer(validation)

    def _pixels(self) -> Prepared:
        if self.group.rank() == 0:
            write_skips(self.work / "skipped.txt", self.folder.skipped)
        draw = partial(class_sheet, classes=self.images.classes)
        if not self.validation:
            return self.images, None, draw
        return *self.images.split(max(round(1 / self.validation), 2)), draw

    # ---- what is trained

    @cached_property
    def flow_config(self) -> FlowConfig | PixelFlowConfig:
        """The config, with what follows from the data. Raises StarflowError if it does not fit that."""
        values = {key: value for key, value in self.config.items() if key not in ("quantization", "pipeline")}
        if self.is_pixels:
            if self.has_cache:
                raise StarflowError(f"{self.data} is a cache of latents, and a TarFlow reads pixels: give the pictures")
            classes = len(self.images.classes)
            known: dict[str, Any] = {"num_classes": classes if classes > 1 else 0}
            values = {"img_size": 32, "channel_size": 3, **values}
        else:
            known = self._of_encoders()
        if self.training.noise_std is not None:
            if self._has_levels:
                raise StarflowError("an iTARFlow is trained at all levels from t0 to t1 of its config: no --noise-std")
            values["noise_std"] = self.training.noise_std
        for key, value in known.items():
            if values.setdefault(key, value) != value:
                raise StarflowError(f"the config's {key} is {values[key]}, and the data's is {value}: leave it out")
        if self.is_pixels:
            return (ITarFlowConfig if self._has_levels else TarFlowConfig).from_dict(values)
        config = FlowConfig.from_dict(values)
        if config.vid_size:
            raise StarflowError("the config is one of videos, and a cache holds pictures")
        return config

    def _of_encoders(self) -> dict[str, Any]:
        """`FROM_ENCODERS` of the cache, or, where there is none yet, of the model that will make one."""
        if not self.has_cache:
            model = CacheModel(self.encoder_model)
            found = (
                model.config.img_size,
                model.vae_config.latent_channels,
                *map(vars(model.config).get, FROM_ENCODERS[2:]),
            )
            return dict(zip(FROM_ENCODERS, found, strict=True))
        cache = self.cache
        square = "1:1" in cache.ratios
        height, _, channels = cache.shapes[cache.ratios.index("1:1") if square else 0]
        found = (height, channels, cache.text_length, cache.text_width, cache.names_ratio)
        known = dict(zip(FROM_ENCODERS, found, strict=True))
        return known if square else {key: value for key, value in known.items() if key != "img_size"}

    @property
    def seed(self) -> int:
        return self.training.seed or 0

    def new(self) -> STARFlow | PixelFlow:
        """The flow as it begins. Its weights are not computed, or read, as long as nobody evaluates them.

        Raises StarflowError if those of `init` do not fit the data.
        """
        mx.random.seed(self.seed)
        flow = FLOWS[self.config["model_type"]].network(self.flow_config)
        if self._init is not None:
            source = self._init.flow.lazy()
            dequantize_module(source)
            weights = {name: array.astype(mx.float32) for name, array in parameters(source).items()}
            made = parameters(flow)
            for name in [name for name in weights if name.endswith(".class_embed")]:
                if name not in made or made[name].shape != weights[name].shape:
                    del weights[name]
            fitting = {
                name: array.shape for name, array in made.items() if name in weights or "class_embed" not in name
            }
            check_shapes({name: array.shape for name, array in weights.items()}, fitting, self._init.path)
            assign(flow, weights)
        return flow

    def step_time(self, choice: Choice) -> str:
        """How long a step takes on this machine, and all of them: some are done, with random data, to find out."""
        config, flow = self.training_config(choice), self.new()
        batch = random_batch(self.flow_config, config.batch_size)
        if isinstance(self.flow_config, ITarFlowConfig):
            levels = (self.flow_config.t0, self.flow_config.t1)
            batch |= level_arrays(np.random.default_rng(0), config.batch_size, levels, config)
        return describe_steps(seconds_per_step(flow, batch, config), config)

    def plan(self, memory: float | None = None) -> tuple[Choice, str]:
        """What a step takes in `memory` bytes (None: this machine's), and what would be chosen on some Macs.

        Raises StarflowError if nothing fits.
        """
        options = self.training
        given, parts = options.batch_size, self._parts
        planner = Planner(
            lambda quantization, rank: self.new(),
            batch_sizes=[max(given // parts, 1)] if given else [32, *BATCH_SIZES],
            checkpoint=options.checkpoint_layers,
            average=options.ema is None or options.ema > 0,
            moments=MOMENTS[options.optimizer or "adamw"],
            half=options.dtype in ("bfloat16", "float16"),
        )
        memory = available() if memory is None else memory
        choice = planner.choose(memory)
        if choice is None:
            raise StarflowError(
                f"training this flow does not fit into this machine's memory ({memory / 2**30:.1f} GiB): "
                "try --batch-size 1, --accumulate, --ema 0, --optimizer adafactor, --dtype bfloat16 or a smaller flow"
            )
        return choice, planner.macs()

    @property
    def _parts(self) -> int:
        """How many parts a batch is computed in, by all processes together."""
        return (self.training.accumulate or 1) * self.group.size()

    def training_config(self, choice: Choice) -> TrainingConfig:
        """All settings, with what is chosen by memory."""
        options = self.training
        steps = STEPS if options.steps is None else options.steps
        defaults: dict[str, Any] = {
            "lr": 5e-4 if self.init is None else 1e-4,
            "context_full": 0.0,
            "context_partial": 0.0,
            "validate_every": max(steps // 20, 1),
        }
        known: dict[str, Any] = {
            "steps": steps,
            "batch_size": options.batch_size or choice.batch_size * self._parts,
            "checkpoint_layers": choice.checkpoint,
            "noise_std": getattr(self.flow_config, "noise_std", 0.0),
        }
        return replace(options.over(TrainingConfig(**{**defaults, **known})), **known)

    # ---- doing it

    def check_output(self) -> None:
        """Raise StarflowError if the model cannot be written to `out`: better before the work than after it."""
        if self.group.rank() == 0:
            check_model_output(self.out, self.config["model_type"], [self.data])

    def run(
        self,
        resume: bool = True,
        begin: Callable[[], None] = lambda: None,
        *,
        progress: Watch = None,
        callback: Callback | None = None,
    ) -> Path:
        """Train, and write the model directory.

        `begin` is called on rank 0 when all that can be refused has been. `progress` and `callback`: see `Progress`;
        its phases are those of `build_cache`, and "train", in whose steps cancelling saves, as Ctrl-C does.

        Raises StarflowError if data or config cannot be used, if `out` holds another model, and what `Trainer` raises.
        """
        progress = watch(progress, callback)
        self.check_output()
        choice, _ = self.plan()
        with distributed.run_folder(self.out):
            return self._run(choice, resume, begin, progress)

    def _run(self, choice: Choice, resume: bool, begin: Callable[[], None], progress: Progress) -> Path:
        self._progress = progress
        training = self.training_config(choice)
        first = self.group.rank() == 0
        flow = self.new()
        size = sum(weight.size for weight in parameters(flow).values())
        data, held_out, draw = self._pixels() if self.is_pixels else self._latents()
        if held_out is None:
            training = replace(training, validate_every=0)
        if first:
            held = f", {held_out.order.count} held out" if held_out else ""
            chosen = replace(choice, batch_size=training.batch_size)
            claim_model(self.out)
            self.report(f"{size / 1e6:.1f} M weights, {data.order.count} pictures{held}; {chosen}")
        trainer = Trainer(
            flow,
            data,
            training,
            self.work / "flow",
            validation=held_out,
            samples=draw,
            identity=self._identity(data, held_out),
            name="train",
            resume=resume,
            progress=progress,
        )
        if first:
            begin()
        assign(flow, trainer.run())
        if first:
            with transaction(self.out):
                self._write(flow)
            save_image(draw(flow).draw(), self.out / "samples.png")
        with distributed.peers("train", self.group):
            distributed.wait(self.group)
        if first:
            self.report(f"wrote {self.out}; its samples are in {self.out / 'samples.png'}")
        return self.out

    def _identity(self, data: IndexedData, held_out: IndexedData | None) -> Identity:
        """What checkpoints are of: the flow's config, the data, its split, and the encoders or the classes."""
        known: dict[str, Any] = {"flow": self.flow_config.to_dict()}
        if self._init is not None:
            known["init"] = weights_digest(self._init.path)
        if isinstance(data, CachedLatents):
            held = [] if held_out is None else sorted(set(range(len(self.cache))) - set(data.subset.tolist()))
            return {
                **known,
                "encoders": {"model": digest(self.cache.identity)},
                "pictures": digest(self.cache.checksums),
                "held-out pictures": digest(held),
            }
        count = 0 if held_out is None else held_out.order.count
        folder = self.folder
        return {
            **known,
            "classes": self.images.classes,
            "pictures": digest(folder.checksums, [captions[0] for captions in folder.captions]),
            "held-out pictures": count,
        }

    def _drawer(self, data: CachedLatents) -> Callable[[STARFlow], SampleSheet]:
        """Images for captions of a few of the images."""
        return caption_drawer(self.cache, first_captions(self.cache, data.subset), self.encoder_model)

    def _write(self, flow: STARFlow | PixelFlow) -> None:
        config = {"model_type": self.config["model_type"], **flow.config.to_dict()}
        if pipeline := self.config.get("pipeline"):
            config["pipeline"] = pipeline
        files: dict[str, bytes] = {}
        if self.is_pixels:
            files[CLASSES_FILE] = "".join(f"{name}\n" for name in self.images.classes).encode()
        else:
            files = copy_parts(ModelDirectory.find(self.encoder_model), self.out)
        save_model(self.out, parameters(flow), config, files=files)
