"""Ways of sampling the same images, run in turn so that their times can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.bench.products import WeightProducts
from mlx_starflow.bench.trials import Task, Trials
from mlx_starflow.planning.traffic import READ_ONCE, evaluation_bytes, tokens_at_once
from mlx_starflow.sampling import Certificate, SamplingTrace
from mlx_starflow.sampling.methods import Method, Settings, block_settings, for_videos

Run = Callable[[], tuple[mx.array, list[int]]]
"""Samples once: gives the sample and the network evaluations of each block, deep block first."""


@dataclass(frozen=True)
class Contender:
    """One way of sampling.

    Attributes:
        method: its name.
        backend: what computes it, such as "mlx".
        run: does it.
        settings: how each block is inverted, data side first.
        bytes: of weights that one network evaluation of each block reads, data side first.
    """

    method: str
    backend: str
    run: Run
    settings: Sequence[Settings]
    bytes: Sequence[int]


@dataclass
class Measurement:
    """What a contender took.

    Attributes:
        evaluations: network evaluations of each block, deep block first.
        certificate: how far the flow, run forwards over its sample, is from the noise.
        seconds: of each round.
        peak_memory: bytes of MLX arrays held at most, weights included; None for other backends.
    """

    contender: Contender
    evaluations: list[int]
    certificate: Certificate
    seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that all evaluations read."""
        return sum(count * size for count, size in zip(self.evaluations[::-1], self.contender.bytes, strict=True))


def measure(
    contenders: Sequence[Contender],
    certify: Callable[[mx.array], Certificate],
    rounds: int = 3,
    report: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Run every contender once to warm up and to certify its sample, then all of them in turn, `rounds` times.

    Whatever else the machine does in the meantime meets all of them alike.
    """
    measured = []
    for contender in contenders:
        start = time.perf_counter()
        x, evaluations = contender.run()
        mx.eval(x)
        report(f"{contender.method}, {contender.backend}: {time.perf_counter() - start:.1f} s to warm up")
        measured.append(Measurement(contender, evaluations, certify(x)))
    for number in range(rounds):
        for one in measured:
            mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(one.contender.run()[0])
            one.seconds.append(time.perf_counter() - start)
            if one.contender.backend == "mlx":
                one.peak_memory = max(one.peak_memory or 0, mx.get_peak_memory())
        report(f"round {number + 1} of {rounds}: {', '.join(f'{one.seconds[-1]:.2f}' for one in measured)} s")
    return measured


def own_contender(name: str, task: Task, method: Method) -> Contender:
    """This code's, by `method`, called `name`."""
    blocks = task.flow.blocks
    if task.frames > 1:
        method = for_videos(method, task.length // task.frames)
    settings, sizes = block_settings(method, len(blocks)), [evaluation_bytes(block) for block in blocks]
    return Contender(name, "mlx", partial(task.sample, method), settings, sizes)


def product_seconds(measured: Measurement, products: WeightProducts, lengths: Sequence[int]) -> float:
    """What the weight products of a contender's evaluations take by themselves, in MLX; lengths as `Task.lengths`."""
    each = products.seconds(list(map(tokens_at_once, measured.contender.settings, lengths)))
    return sum(count * seconds for count, seconds in zip(measured.evaluations[::-1], each, strict=True))


def torch_contenders(trials: Trials, methods: Sequence[str], dtype: mx.Dtype | None) -> list[Contender]:
    """The PyTorch reference of a model with the same weights and noise: its sequential sampling, and those of the other
    methods that it has; with CUDA if there is one. `dtype` None: the reference's own.

    Raises:
        StarflowError: PyTorch is not installed, or the reference does not run in this dtype.
    """
    from mlx_starflow.reference.loading import load_flow, parse_device
    from mlx_starflow.reference.sampling import METHODS, sample

    device = parse_device(None)
    flow = load_flow(trials.directory, device, dtype)
    z, text, null_text = (_tensor(array, device) for array in (trials.task.z, trials.task.text, trials.task.null_text))

    def run(method: str) -> tuple[mx.array, list[int]]:
        trace = SamplingTrace()
        x = sample(flow, z, text, null_text, trials.task.guidance, method, trace=trace)
        return mx.array(x.float().cpu().numpy()), trace.evaluations

    names = dict.fromkeys(["sequential", *(name for name in methods if name in METHODS)])
    sizes = [reference_bytes(block) for block in flow.blocks]
    return [Contender(name, "torch", partial(run, name), [METHODS[name]()] * len(sizes), sizes) for name in names]


def reference_bytes(block: Any) -> int:
    """`traffic.evaluation_bytes` of a block of the PyTorch reference."""
    weights = block.named_parameters()
    return sum(w.numel() * w.element_size() for name, w in weights if name.partition(".")[0] not in READ_ONCE)


def _tensor(array: mx.array | None, device: Any) -> Any:
    import torch

    if array is None:
        return None
    kind = mx.float32 if mx.issubdtype(array.dtype, mx.floating) else mx.int64
    return torch.from_numpy(np.array(array.astype(kind))).to(device)
