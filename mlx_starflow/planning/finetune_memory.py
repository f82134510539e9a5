"""How much memory training a flow takes, computed from its config before anything is loaded, and what that allows.

What is trained, its gradient and the optimizer's numbers are counted exactly; activations as in `footprint`: the arrays
that layers make, times its margin, an upper estimate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.kernels.memory import usable
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.tarflow import PixelFlowConfig
from mlx_starflow.models.trees import flattened
from mlx_starflow.planning.footprint import MARGIN, there_and_back

MACS = (16, 32, 64)
"""Memory, in GiB, of the Macs that a plan names."""

BATCH_SIZES = (16, 8, 4, 2, 1)
ENOUGH = 8
"""Samples a step that a smaller base is better than fewer of."""

PRECISIONS = (None, "8", "mixed")
"""Of a frozen base, the best first: as it is stored, and as `quantize_module` takes it."""

RANKS = (16, 8, 4)


@dataclass(frozen=True)
class TrainingPlan:
    """What one step takes, in bytes.

    Attributes:
        weights: of the flow, and of the frozen copy of it that anchoring a full fine-tuning needs.
        gradients, optimizer: of what is trained; the latter is AdamW's two moments, or what another optimizer keeps,
            and the averaged weights.
        activations: what a step computes and keeps for the gradient, and what else it holds for a while.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "peak")
        return "\n".join(f"{part:<12}{getattr(self, part) / 2**20:12,.1f} MiB" for part in parts)


def training_plan(
    flow: nn.Module,
    batch_size: int,
    *,
    copy: bool = False,
    checkpoint: bool = True,
    average: bool = True,
    moments: int = 2,
    half: bool = False,
) -> TrainingPlan:
    """Memory of training steps of `batch_size` samples.

    Args:
        flow: with adapters or without, frozen as it will be trained; its numbers are not computed.
        batch_size: samples at once, those of the anchor among them.
        copy: a frozen copy of the flow is held besides.
        checkpoint: layers are computed again for the gradient.
        average: the moving average of what is trained is held.
        moments: numbers that the optimizer keeps of each weight.
        half: networks compute in half precision, with trained weights in float32.
    """
    config: FlowConfig | PixelFlowConfig = flow.config
    stored = sum(array.nbytes for _, array in flattened(flow.parameters()))
    trained = sum(array.nbytes for _, array in flattened(flow.trainable_parameters()))
    tokens = (config.img_size // config.patch_size) ** 2
    # In half precision, sums and softmax are float32 still.
    item = 3 if half else (min(array.itemsize for array in _floating(flow)) + 4) / 2
    if isinstance(config, FlowConfig):
        kept, made = there_and_back(config.blocks, tokens, config.txt_size, checkpoint)
    else:
        blocks = [config.block(index) for index in range(config.blocks)]
        kept, made = there_and_back(blocks, tokens, 0, checkpoint)
    work = item * (batch_size * kept + MARGIN * (batch_size * made + _whole_weights(flow)))
    return TrainingPlan(
        weights=stored * (2 if copy else 1) + (trained // 2 if half else 0),
        gradients=trained,
        optimizer=(moments + average) * trained,
        # The optimizer's new numbers come when activations have gone.
        activations=int(max(work, (moments + average) * trained)),
    )


def _whole_weights(flow: nn.Module) -> int:
    """Numbers of the weights that are computed on the way: quantized layers are unpacked for each product, those of
    one transformer layer there, there again and back, and DoRA computes whole ones of every layer it changes."""
    unpacked: Counter[str] = Counter()
    for path, each in quantized_layers(flow).items():
        unpacked[".".join(path.split(".")[:4])] += each.weight.size * 32 // each.bits
    adapted = [each for _, each in flow.named_modules() if "lora_a" in each and "m" in each]
    dense = sum(math.prod(each.lora_a.shape[:1] + each.lora_b.shape[1:]) for each in adapted)
    return 3 * max(unpacked.values(), default=0) + dense


def _floating(flow: nn.Module) -> list[mx.array]:
    arrays = [array for _, array in flattened(flow.parameters())]
    return [array for array in arrays if mx.issubdtype(array.dtype, mx.floating)]


@dataclass(frozen=True)
class Choice:
    """What fits into some memory.

    Attributes:
        batch_size: samples a step.
        checkpoint: layers are computed again for the gradient.
        quantization: of the frozen base, as `quantize_module` takes it; None: as it is stored.
        rank: of the adapter.
        plan: what a step takes.
    """

    batch_size: int
    checkpoint: bool
    quantization: str | None
    rank: int
    plan: TrainingPlan

    def __str__(self) -> str:
        base = f"base quantized to {self.quantization}, " if self.quantization else ""
        rank = f"rank {self.rank}, " if self.rank else ""
        layers = "layers computed twice" if self.checkpoint else "layers computed once"
        return f"batch size {self.batch_size}, {base}{rank}{layers}, {self.plan.peak / 2**30:,.1f} GiB"


class Planner:
    """Finds settings that fit.

    What is given up, in this order: layers that are computed once, samples down to `ENOUGH`, the base's precision, the
    other samples, the adapter's rank.

    Args:
        make_flow: from the base's quantization and the adapter's rank, the flow as it will be trained; its numbers are
            not computed.
        precisions, ranks: to choose from, the best first.
        batch_sizes: to choose from, the largest first.
        checkpoint: None: whichever fits.
        copy, average, moments, half: as in `training_plan`.
    """

    def __init__(
        self,
        make_flow: Callable[[str | None, int], nn.Module],
        *,
        precisions: Sequence[str | None] = (None,),
        ranks: Sequence[int] = (0,),
        batch_sizes: Sequence[int] = BATCH_SIZES,
        checkpoint: bool | None = None,
        copy: bool = False,
        average: bool = True,
        moments: int = 2,
        half: bool = False,
    ):
        self.flow, self.plan = cache(make_flow), cache(self._plan)
        self.precisions, self.ranks, self.batch_sizes = precisions, ranks, batch_sizes
        self.checkpoints = (False, True) if checkpoint is None else (checkpoint,)
        self._training_plan = partial(training_plan, copy=copy, average=average, moments=moments, half=half)

    def _plan(self, precision: str | None, rank: int, size: int, checkpoint: bool) -> TrainingPlan:
        return self._training_plan(self.flow(precision, rank), size, checkpoint=checkpoint)

    def choose(self, memory: float) -> Choice | None:
        """What to do with `memory` bytes; None if nothing fits."""
        most = self.batch_sizes[0]
        many = [size for size in self.batch_sizes if size >= min(ENOUGH, most)]
        few = [size for size in self.batch_sizes if size not in many]
        best, least = self.ranks[0], self.precisions[-1]
        tried = [(precision, best, size) for precision in self.precisions for size in many]
        tried += [(least, best, size) for size in few]
        tried += [(least, rank, size) for rank in self.ranks[1:] for size in self.batch_sizes[-1:]]
        for precision, rank, size in tried:
            for checkpoint in self.checkpoints:
                plan = self.plan(precision, rank, size, checkpoint)
                if plan.peak <= memory:
                    return Choice(size, checkpoint, precision, rank, plan)
        return None

    def macs(self) -> str:
        """A line for each Mac in `MACS`: what is chosen there."""
        lines = []
        for gigabytes in MACS:
            choice = self.choose(usable(gigabytes * 2**30))
            lines.append(f"{gigabytes} GB Mac: {choice or 'does not fit'}")
        return "\n".join(lines)
