"""What each precision of a flow costs: certificates, evaluations, likelihood, pictures, round trips.

    python examples/reports/precision.py                        # the embedded model, and the flow of tests/data
    python examples/reports/precision.py --model my/model       # another model of pictures

Every precision samples the same noise, and its likelihood is taken of the same pictures: samples that the float32 flow
made, with the training noise that is in them. Evaluations are means over the prompts, deep block first. MLX's CPU
backend computes half precision too, slowly, and sums quantized products in the precision of the scales; those rows are
left out there. On a GPU the figures differ: its products of few and of many rows add up in different orders.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow import load, load_flow
from mlx_starflow.editing.maps import from_noise, to_noise
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.quantization import dequantize_module, quantize_module, quantized_layers
from mlx_starflow.model_dir.weights import device, dtype_name, parameters
from mlx_starflow.models.flow import Flow, is_layer_weight
from mlx_starflow.pipelines import ImagePipeline
from mlx_starflow.sampling import (
    Certificate,
    GuidedFlow,
    JacobiSettings,
    RollingSettings,
    SamplingTrace,
    certify,
    denoise,
    sample,
)

TRAINED = Path(__file__).resolve().parents[2] / "tests/data/latent_flow"
"""A trained flow of 256 tokens of an autoencoder's latents, and embeddings of a prompt for it."""

PROMPTS = ("a slice of pizza", "a fox", "two fish under water", "a red apple on a blue background")


@dataclass
class Samples:
    """What a model's precisions are compared on.

    Attributes:
        pipe: decodes, where there is an autoencoder.
        make: the flow in float32, dense.
        z: noise of the samples, one a prompt.
        text, null: their conditions.
        guidance: its weight.
        shape: of one picture's latents.
        pictures: how many, for the likelihood.
    """

    pipe: ImagePipeline | None
    make: Callable[[], nn.Module]
    z: mx.array
    text: mx.array
    null: mx.array
    guidance: float
    pictures: int

    def each(self) -> Iterator[tuple[mx.array, mx.array, mx.array, float]]:
        for index in range(len(self.z)):
            yield self.z[index : index + 1], self.text[index : index + 1], self.null, self.guidance

    def data(self, flow: Flow) -> tuple[mx.array, mx.array]:
        """Samples without guidance, and their conditions."""
        noise = mx.array(draw_noise(range(1000, 1000 + self.pictures), self.z.shape[1:]))
        text = self.text[mx.arange(self.pictures) % len(self.text)]
        return sample(flow, noise, text), text


@dataclass(frozen=True)
class Kind:
    """A precision: of the layers' weights, of what is between them, and bits of quantized layers."""

    name: str
    layers: mx.Dtype
    between: mx.Dtype
    bits: str = ""

    def cast(self, flow: nn.Module) -> nn.Module:
        if self.bits:
            quantize_module(flow, self.bits)
        scales = {f"{path}.{kind}" for path in quantized_layers(flow) for kind in ("scales", "biases")}
        cast = []
        for name, weight in parameters(flow).items():
            if mx.issubdtype(weight.dtype, mx.floating):
                weight = weight.astype(self.layers if name in scales or is_layer_weight(name) else self.between)
            cast.append((name, weight))
        flow.load_weights(cast)
        mx.eval(flow.parameters())
        return flow


def kinds() -> list[Kind]:
    found = [Kind("float32", mx.float32, mx.float32)]
    for half in (mx.float16, mx.bfloat16):
        name = dtype_name(half)
        found += [Kind(f"{name} alone", half, half), Kind(f"{name}, float32 between", half, mx.float32)]
    for bits in ("8", "4"):
        found.append(Kind(f"{bits} bits, float32", mx.float32, mx.float32, bits))
        if device() != "cpu":
            found.append(Kind(f"{bits} bits, float16", mx.float16, mx.float32, bits))
    return found


def embedded(model: str, prompts: int, pictures: int) -> Samples:
    """A model's own samples, at its own guidance and temperature."""
    pipe = load(model, dtype="float32")
    texts = pipe.encode_prompts([*PROMPTS[:prompts], ""])
    z = pipe.settings.temperature * mx.array(draw_noise(range(7, 7 + prompts), pipe.latent_shape()))
    return Samples(pipe, lambda: dense(model), z, texts[:-1], texts[-1:], pipe.settings.guidance, pictures)


def trained(pictures: int) -> Samples:
    """One sample of the flow of tests/data, with guidance 2.5, and the embeddings of a prompt that lie beside it."""
    texts = mx.load(str(TRAINED / "text.safetensors"))
    z = mx.array(draw_noise([7], (16, 16, 4)))
    return Samples(None, lambda: dense(TRAINED), z, texts["text"], texts["null"], 2.5, pictures)


def dense(model: str | Path) -> nn.Module:
    flow = load_flow(model, dtype="float32")
    dequantize_module(flow)
    return flow


class Report:
    """The rows of one table."""

    def __init__(self, samples: Samples, tolerances: list[float]):
        self.samples, self.tolerances = samples, tolerances
        reference = samples.make()
        self.data, self.text = samples.data(reference)
        self.nll = self.likelihood(reference)
        self.pictures: np.ndarray | None = None

    def likelihood(self, flow: Flow) -> np.ndarray:
        each = [flow(self.data[i : i + 1], self.text[i : i + 1]).nll() for i in range(len(self.data))]
        return np.array(mx.concatenate(each)).astype(np.float64)

    def sampled(self, flow: Flow, method: str | JacobiSettings | RollingSettings) -> tuple[str, list[mx.array]]:
        """Evaluations and certificate, and the samples."""
        evaluations, certificates, made = np.zeros(len(flow.blocks)), [], []
        for task in self.samples.each():
            trace = SamplingTrace()
            made.append(sample(flow, *task, method, trace=trace))
            evaluations += trace.evaluations
            certificates.append(certify(flow, made[-1], *task))
        worst = Certificate.worst(certificates)
        counts = evaluations / len(made)
        words = " + ".join(f"{count:g}" for count in counts.round(1)) + f" = {counts.sum():g}"
        return f"{words}; {worst.max:.0e}, {worst.rms:.0e}", made

    def row(self, kind: Kind) -> list[str]:
        flow = kind.cast(self.samples.make())
        exact, made = self.sampled(flow, "sequential")
        cells = [kind.name, exact.partition("; ")[2]]
        methods = [JacobiSettings(), *(RollingSettings(tolerance=tolerance) for tolerance in self.tolerances)]
        cells += [self.sampled(flow, method)[0] for method in methods]
        change = self.likelihood(flow) - self.nll
        error = change.std(ddof=1) / np.sqrt(len(change))
        cells.append(f"{change.mean():+.0e} +- {error:.0e}, {np.abs(change).max():.0e}")
        clean = mx.concatenate([denoise(flow, x, task[1]) for x, task in zip(made, self.samples.each(), strict=True)])
        cells.append(self.likeness(np.array(clean)))
        x = self.data[: len(made)]
        guided = GuidedFlow(flow, x.shape, self.text[: len(made)])
        error = np.array(from_noise(guided, to_noise(guided, x)) - x)
        return [*cells, f"{np.abs(error).max():.0e}, {np.sqrt(np.square(error).mean()):.0e}"]

    def likeness(self, clean: np.ndarray) -> str:
        """PSNR of the pictures of clean latents, against those of the first row; of latents alone there is none."""
        if self.samples.pipe is None:
            return ""
        pictures = np.clip(self.samples.pipe.decode_images(clean), -1, 1)
        if self.pictures is None:
            self.pictures = pictures
        square = float(np.square(pictures - self.pictures).mean())
        return f"{10 * np.log10(4 / square):.0f} dB" if square else "same"

    @property
    def titles(self) -> list[str]:
        windows = [f"window, {tolerance:g}" for tolerance in self.tolerances]
        return [
            "precision", "sequential", "blocks", *windows, "NLL - float32's, largest", "PSNR", "there and back",
        ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model directory, or demo")
    parser.add_argument("--prompts", type=int, default=2, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--pictures", type=int, default=16, help="for the likelihood")
    parser.add_argument("--tolerances", type=float, nargs="*", default=[1e-3, 1e-2, 5e-2], help="of windows")
    parser.add_argument("--only", nargs="*", help="precisions whose names begin so")
    args = parser.parse_args(arguments)
    machine = mx.device_info().get("device_name", platform.processor())
    print(f"machine: {machine}, MLX {mx.__version__} on {device()}")
    models = {args.model: lambda: embedded(args.model, args.prompts, args.pictures)}
    if args.model == "demo" and TRAINED.is_dir():
        models["256 tokens, guidance 2.5"] = lambda: trained(args.pictures)
    for name, make in models.items():
        report = Report(make(), args.tolerances)
        print(f"\n{name}: evaluations; largest |f(x) - z| and RMS. NLL in nats per dimension.\n")
        print("| " + " | ".join(report.titles) + " |\n" + "|---" * len(report.titles) + "|")
        for kind in kinds():
            if not args.only or kind.name.startswith(tuple(args.only)):
                print("| " + " | ".join(report.row(kind)) + " |", flush=True)


if __name__ == "__main__":
    main()
