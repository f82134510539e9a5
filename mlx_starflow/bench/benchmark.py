"""What `mlx-starflow bench` measures: ways of sampling from a model on this machine, against what its weights cost."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow import cpu
from mlx_starflow.bench.contenders import (
    Contender,
    Measurement,
    measure,
    own_contender,
    product_seconds,
    torch_contenders,
)
from mlx_starflow.bench.products import WeightProducts
from mlx_starflow.bench.trials import PROMPTS, Task, Trials, prepare
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.weights import dtype_name, parse_dtype
from mlx_starflow.models.flow import products_in
from mlx_starflow.sampling.methods import METHODS

ALL_METHODS = (*METHODS, "auto")
BACKENDS = ("torch",)
"""What MLX can be compared with."""

MOST_ROUNDS = 10_000
"""In which every method is timed once."""


@dataclass
class Benchmark:
    """What `bench` measured.

    Attributes:
        about: model, machine, settings.
        task: what was sampled.
        products: what the weight products cost by themselves.
        measured: the methods.
        notes: what could not be measured, and why.
    """

    about: dict[str, Any]
    task: Task
    products: WeightProducts
    measured: list[Measurement]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: seconds, bytes and bytes a second; lists of blocks begin with the deep one."""
        blocks = [
            {
                "block": index,
                "layers": block.config.num_layers,
                "rows": self.products.rows[index],
                "weight_bytes": self.products.bytes[index],
                "product_seconds": self.products.vector_seconds[index],
            }
            for index, block in enumerate(self.task.flow.blocks)
        ]
        return {
            **self.about,
            "matrix_vector_bandwidth": self.products.bandwidth,
            "blocks": blocks[::-1],
            "methods": [self.figures(one) for one in self.measured],
            "ratios": self.ratios(),
            "notes": self.notes,
        }

    def figures(self, measured: Measurement) -> dict[str, Any]:
        """All about one method.

        `share` is the bandwidth at which it goes through weights, relative to that of matrix-vector products of these
        weights; `product_seconds` what the products of all its evaluations, with as many rows as they have, take by
        themselves. Both are None for other backends, whose products are not measured.
        """
        lengths, images, seconds = self.task.lengths[::-1], self.task.images, measured.median
        blocks = list(zip(lengths, measured.evaluations, strict=True))
        tokens = images * sum(length for length, count in blocks if count)
        bandwidth = measured.weight_bytes / seconds
        ours = measured.contender.backend == "mlx"
        alone = product_seconds(measured, self.products, self.task.lengths) if ours else None
        return {
            "method": measured.contender.method,
            "backend": measured.contender.backend,
            "seconds": seconds,
            "rounds": measured.seconds,
            "tokens_per_second": tokens / seconds,
            "evaluations": measured.evaluations,
            "evaluations_per_frame": sum(measured.evaluations) / self.task.frames,
            "seconds_per_frame": seconds / (images * self.task.frames),
            "tokens_per_evaluation": [length / count if count else 0.0 for length, count in blocks],
            "weight_bytes_per_picture": measured.weight_bytes / images,
            "bandwidth": bandwidth,
            "share": bandwidth / self.products.bandwidth if ours else None,
            "product_seconds": alone,
            "seconds_over_products": None if alone is None else seconds / alone,
            "peak_memory": measured.peak_memory,
            "certificate": {"max": measured.certificate.max, "rms": measured.certificate.rms},
        }

    def ratios(self) -> dict[str, dict[str, float]]:
        """How many times as fast MLX's methods are as those of another backend: {"torch": {"sequential": ...}}.

        Each is compared with the same method or, where the other backend lacks it, with its sequential sampling.
        """
        times = {(one.contender.backend, one.contender.method): one.median for one in self.measured}
        found: dict[str, dict[str, float]] = {}
        for backend in sorted({backend for backend, _ in times} - {"mlx"}):
            ours = {method: seconds for (name, method), seconds in times.items() if name == "mlx"}
            found[backend] = {
                method: times.get((backend, method), times[backend, "sequential"]) / seconds
                for method, seconds in ours.items()
            }
        return found

    def lines(self) -> list[str]:
        """The same for people."""
        everything = self.to_dict()
        lines = [f"{name:<11} {value}" for name, value in self.about.items()]
        for block in everything["blocks"]:
            lines.append(
                f"{'block ' + str(block['block']):<11} {block['layers']} layers, "
                f"{block['weight_bytes'] / 2**20:.1f} MiB of weights a network evaluation; its products with "
                f"{'one row' if block['rows'] == 1 else str(block['rows']) + ' rows'} take "
                f"{1e3 * block['product_seconds']:.2f} ms"
            )
        lines += [f"bandwidth   {self.products.bandwidth / 1e9:.2f} GB/s: these products by themselves", "", _HEAD]
        lines += [_row(one) for one in everything["methods"]]
        lines += ["", "network evaluations (tokens each) of each block, deep block first:"]
        for one in everything["methods"]:
            counts = zip(one["evaluations"], one["tokens_per_evaluation"], strict=True)
            lines.append(_name(one) + "  " + ", ".join(f"{count} ({tokens:.1f})" for count, tokens in counts))
        if self.task.frames > 1:
            lines += ["", f"a latent frame, of which a video has {self.task.frames}:"]
            for one in everything["methods"]:
                took = f"{one['evaluations_per_frame']:.2f} evaluations, {one['seconds_per_frame']:.3f} s"
                lines.append(f"{_name(one)}  {took}")
        for backend, ratios in everything["ratios"].items():
            faster = ", ".join(f"{method} {ratio:.2f}" for method, ratio in ratios.items())
            lines += ["", f"times as fast as {backend} (where it has no such method, as its sequential one): {faster}"]
        if self.notes:
            lines += ["", *(f"Note: {note}" for note in self.notes)]
        return lines


_COLUMNS = {
    "seconds": 9,
    "(range)": 14,
    "tokens/s": 10,
    "weights": 11,
    "GB/s": 7,
    "share": 7,
    "x products": 12,
    "peak": 10,
}
_HEAD = f"{'':<17}" + "".join(f"{name:>{width}}" for name, width in _COLUMNS.items()) + "  |f(x) - z|"


def _name(figures: dict[str, Any]) -> str:
    return f"{figures['method']:<11}{figures['backend']:<6}"


def _row(figures: dict[str, Any]) -> str:
    certificate = figures["certificate"]

    def cell(name: str, form: str, unit: float = 1) -> str:
        return "-" if figures[name] is None else form.format(figures[name] / unit)

    cells = (
        cell("seconds", "{:.2f}"),
        f"({min(figures['rounds']):.2f}-{max(figures['rounds']):.2f})",
        cell("tokens_per_second", "{:.0f}"),
        cell("weight_bytes_per_picture", "{:.2f} GiB", 2**30),
        cell("bandwidth", "{:.2f}", 1e9),
        cell("share", "{:.0%}"),
        cell("seconds_over_products", "{:.2f}"),
        cell("peak_memory", "{:.0f} MiB", 2**20),
    )
    row = "".join(f"{text:>{width}}" for text, width in zip(cells, _COLUMNS.values(), strict=True))
    return f"{_name(figures)}{row}  {certificate['max']:.0e}, RMS {certificate['rms']:.0e}"


def bench(
    model: str | Path = "demo",
    prompts: Sequence[str] = PROMPTS[:1],
    *,
    methods: Sequence[str] = ALL_METHODS,
    guidance: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    dtype: str | mx.Dtype | None = None,
    rounds: int = 3,
    against: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Benchmark:
    """Time ways of sampling from a model on this machine.

    Args:
        model: "demo", a model directory or a Hub repository.
        prompts: of the images, which are sampled as one batch; as many classes for a TarFlow.
        methods: of `ALL_METHODS`; "auto" is the model's sampling plan, or "rolling" if it has none.
        guidance: its weight; None: the model's own.
        seed: of the first image's noise; the others' count up.
        size: (width, height) of the images in pixels; None: the size the model was trained at.
        frames: of videos, 1 for a picture; None: as many as a model of videos was trained on.
        dtype: of the flow; None or "auto": what `precision.automatic` says.
        rounds: how often each method is timed.
        against: "torch": time the PyTorch reference too, with CUDA if there is one.
        report: is told how it goes.

    Raises:
        StarflowError: the model cannot be read, or an argument is wrong.
    """
    if unknown := [name for name in methods if name not in ALL_METHODS]:
        raise StarflowError(f"unknown sampling method {unknown[0]!r}; it must be one of {', '.join(ALL_METHODS)}")
    if not methods:
        raise StarflowError(f"there is no method to time; give one of {', '.join(ALL_METHODS)}")
    if against not in (None, *BACKENDS):
        raise StarflowError(f"cannot compare with {against!r}; it must be {' or '.join(BACKENDS)}")
    if not 1 <= rounds <= MOST_ROUNDS:
        raise StarflowError(f"there must be at least one round and at most {MOST_ROUNDS:,}, not {rounds}")
    dtype = parse_dtype(dtype)
    trials = prepare(model, prompts, guidance=guidance, seed=seed, dtype=dtype, size=size, frames=frames)
    task = trials.task
    contenders, notes = _ours(trials, list(dict.fromkeys(methods)), str(model))
    about = {
        "model": str(model),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "mlx": f"{version('mlx')} on the {mx.default_device().type.name.upper()}, BLAS {cpu.describe()}",
        "dtype": dtype_name(products_in(task.flow)),
        "pictures": task.images,
        "tokens": task.length,
        "frames": task.frames,
        "guidance": task.guidance,
        "seed": seed,
    }
    if against == "torch":
        contenders += torch_contenders(trials, [contender.method for contender in contenders], dtype)
        about["torch"] = _describe_torch(dtype)
        notes.append(
            "the PyTorch reference samples sequentially or by Jacobi blocks, with weights that are not quantized"
        )
    products = WeightProducts(task.flow, task.rows())
    return Benchmark(about, task, products, measure(contenders, task.certify, rounds, report), notes)


def _ours(trials: Trials, methods: list[str], model: str) -> tuple[list[Contender], list[str]]:
    """MLX's contenders, and a note if there is no plan for "auto"."""
    contenders = [own_contender(name, trials.task, name) for name in methods if name != "auto"]
    notes = []
    if "auto" in methods and trials.plan is not None:
        contenders.append(own_contender("auto", trials.task, trials.plan.without_drafts()))
    elif "auto" in methods:
        if "rolling" not in methods:
            contenders.append(own_contender("rolling", trials.task, "rolling"))
        notes.append(f"auto is rolling, since this model has no sampling plan: mlx-starflow tune {model} makes one")
    return contenders, notes


def _describe_torch(dtype: mx.Dtype | None) -> str:
    """With the precision, which is not ours where the reference has chosen it: it has no float16."""
    import torch

    from mlx_starflow.reference.loading import parse_device
    from mlx_starflow.reference.loading import parse_dtype as parse_torch_dtype

    where = parse_device(None)
    device = "CUDA" if where.type == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    return f"{torch.__version__} on {device}, {str(parse_torch_dtype(dtype, where)).rpartition('.')[2]}"
