"""A new flow over text from a text file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.text import MOST_TEXT
from mlx_starflow.media.files import expanded, read_text
from mlx_starflow.model_dir.directory import TEXT_FLOW
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.text_flow import UNKNOWN, TextFlow, TextFlowConfig
from mlx_starflow.pipelines.text import TextPipeline
from mlx_starflow.training.config import TrainingConfig, TrainingOptions
from mlx_starflow.training.data.text_windows import TextWindows, split_text
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.identity import digest
from mlx_starflow.training.loop.reporting import check_reporter
from mlx_starflow.training.loop.text_objective import text_loss, text_nats
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign
from mlx_starflow.training.output import check_model_output, claim_model

TEXT_PRESET: dict[str, Any] = {
    "model_type": TEXT_FLOW, "length": 128, "channels": 128, "layers_per_block": [3, 1],
}  # fmt: skip
"""The preset `text`: what does not follow from the text."""

AHEAD = 8
"""Next tokens that are read in a gap, unless the config says otherwise."""

TRAINING = TrainingConfig(steps=2000, batch_size=16, lr=2e-3, ema=0.995)
"""How it is trained, unless told otherwise."""

RARE = 3
"""Characters that occur less often than this are unknown ones."""

SAMPLES = 4


@dataclass
class NewTextFlow:
    """A training of a text flow from nothing.

    Args:
        data: a text file, UTF-8.
        out: the model directory to write; checkpoints and logs are in `out/training`.
        config: a `TextFlowConfig`'s values, with `model_type`. What follows from the text may be left out: `alphabet`,
            the characters that occur in it, `components`, a Gaussian for each of them in the first block, and `ahead`.
        training: how to train; what is not given is as in `TRAINING`.
        validation: share of the text that is held out.
        report: is told, in a line, what goes on.
    """

    data: Path
    out: Path
    config: Mapping[str, Any] = field(default_factory=lambda: TEXT_PRESET)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    validation: float = 0.05
    report: Callable[[str], None] = field(default=lambda line: None, repr=False)

    def __post_init__(self) -> None:
        self.data, self.out = expanded(self.data), Path(self.out)
        if not 0 <= self.validation <= 0.5:
            raise StarflowError(f"train: validation must be in 0..0.5, not {self.validation}")
        if self.training.patience and not self.validation:
            raise StarflowError("train: --patience needs text to validate on: leave out --validation 0")
        if self.training.checkpoint_layers:
            raise StarflowError("train: a text flow is small, and knows no gradient checkpointing: leave it out")
        check_reporter(self.training.report_to)

    @cached_property
    def text(self) -> str:
        """The file's text. Raises StarflowError if it cannot be read."""
        return read_text(self.data, MOST_TEXT)

    @cached_property
    def flow_config(self) -> TextFlowConfig:
        """The config, with what follows from the text. Raises StarflowError if it is not usable."""
        values = {key: value for key, value in self.config.items() if key not in ("model_type", "pipeline")}
        if "alphabet" not in values:
            counts = Counter(self.text)
            known = sorted(character for character, count in counts.items() if count >= RARE)
            values["alphabet"] = "".join(known) + (UNKNOWN if len(known) < len(counts) else "")
        layers = values.get("layers_per_block")
        if "components" not in values and isinstance(layers, list):
            values["components"] = [len(values["alphabet"]), *[0] * (len(layers) - 1)]
        values.setdefault("ahead", AHEAD)
        return TextFlowConfig.from_dict(values)

    def training_config(self) -> TrainingConfig:
        """All settings. Raises StarflowError if they do not fit together."""
        config = self.training.over(TRAINING)
        every = max(config.steps // 20, 1) if self.training.validate_every is None else config.validate_every
        return replace(config, validate_every=every if self.validation else 0)

    def run(self, resume: bool = True, begin: Callable[[], None] = lambda: None) -> Path:
        """Train, and write the model directory; the arguments and what is raised are `NewFlow.run`'s."""
        group = distributed.world()
        first = group.rank() == 0
        training, config = self.training_config(), self.flow_config
        if first:
            check_model_output(self.out, TEXT_FLOW, [self.data])
        mx.random.seed(training.seed)
        flow = TextFlow(config)
        mx.eval(flow.parameters())
        characters = np.array(flow.characters(self.text), np.int32)
        trained, held = split_text(characters, self.validation)
        data = TextWindows(trained, config.length, config.size, config.patch_size)
        held_out = None
        if self.validation:
            held_out = TextWindows(held, config.length, config.size, config.patch_size, gaps=0.0)
        with distributed.run_folder(self.out):
            if first:
                claim_model(self.out)
            trainer = Trainer(
                flow,
                data,
                training,
                self.out / "training/flow",
                loss=text_loss,
                validation=held_out,
                nll=text_nats,
                unit="nats/character",
                constant=0.0,
                identity={"flow": config.to_dict(), "text": digest(characters), "held out": self.validation},
                name="train",
                resume=resume,
            )
            if first:
                size = sum(weight.size for weight in parameters(flow).values())
                self.report(
                    f"{size / 1e6:.1f} M weights, {len(config.alphabet)} characters, {len(trained)} to train on, "
                    f"{len(held)} held out"
                )
                begin()
            assign(flow, trainer.run())
            if first:
                with transaction(self.out):
                    save_model(self.out, parameters(flow), {"model_type": TEXT_FLOW, **config.to_dict()})
                made = TextPipeline(str(self.out), flow).generate(texts=SAMPLES, seed=0, progress=False)
                samples = self.out / "samples.txt"
                samples.write_text("\n----\n".join(made.texts) + "\n", encoding="utf-8")
                bits = trainer.validation.state["best"] if trainer.validation else None
                held_bits = "" if bits is None else f"; {bits / math.log(2):.3f} bits per character of what is held out"
                self.report(f"wrote {self.out}{held_bits}; its samples are in {samples}")
        return self.out
