"""The embedded model on this machine: the image of a seed, certificates, likelihood, round trip, memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.bench.doctor.checks import Check, Finding, at_most, within
from mlx_starflow.kernels.memory import available
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.quantization import dequantize_module
from mlx_starflow.model_dir.weights import MLX_DTYPES, automatic_dtype, cast_weights, dtype_name
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.pipelines import load
from mlx_starflow.planning.memory import plan
from mlx_starflow.sampling import Certificate
from mlx_starflow.sampling.methods import Method
from mlx_starflow.sampling.noise_floor import HALF

PROMPT, SEED = "a fox to the left of a cactus at night", 7

CELLS = 4
"""Rows and columns of the means that stand for an image."""

IMAGE_MEANS = """
    161a35 151935 151835 151935
    77493e 875943 456c56 42634b
    8f5b5f b6846e 438257 315553
    18232d 18242b 162329 17232b
"""
"""Red, green and blue of each cell of the image of `PROMPT` and `SEED`, row by row, in hexadecimal. It was made in
float32 on a Linux CPU; examples/reports/embedded_model.py prints it."""

NLL = -0.765551
"""Of its latents, in nats a dimension."""

IMAGE_BOUNDS = {"float32": 0.7, "float16": 1.0, "bfloat16": 2.0}
"""Root mean square difference from these means, in levels of 255; another seed's image is 4 to 9 away, a white one
194."""

NLL_BOUNDS = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 5e-3}

CERTIFICATE_BOUNDS = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 0.3}
"""Of sequential samples: about ten times what is measured on a CPU, 7e-6, 4e-3 and 2e-2."""

WINDOW_BOUNDS = {"float32": 2e-2, "float16": 5e-2, "bfloat16": 0.5}
"""Of the rolling window's samples: its tolerance at each token, added up over blocks, or the precision's own error."""

FLOOR_ROUNDINGS = 64
"""Roundings that the noise floor of a half precision may be; on a CPU the embedded model's is 5 to 11."""

FLOOR_EVALUATIONS = 2
"""Evaluations of a block, more than in float32, that a window may need in half precision: to notice the floor and to
measure it. A window that does not know the floor takes twice as many in bfloat16 as in float32."""

FLOOR_CERTIFICATE = 8.0
"""Of a window that the floor held up, over that floor: tokens go at twice that in each of three blocks."""

ROUND_TRIP = 1e-3
"""Of normalized latents, as edits promise."""


@dataclass(frozen=True)
class Sampled:
    """What came of sampling the image in one precision."""

    image: Image.Image
    certificate: Certificate
    nll: float
    evaluations: list[int]


def checks() -> list[Check]:
    """The longest of all, since MLX's CPU backend is slow in half precision; each precision is sampled once."""
    sampled = cache(_sample)
    report = "Use --dtype float32, and report this line."
    return [
        Check(
            "memory",
            "the embedded model fits",
            "Close other programs: this machine has too little memory for even the smallest model.",
            room,
        ),
        Check("image of a seed", at_most(IMAGE_BOUNDS) + " levels of 255", report, lambda: images(sampled)),
        *(
            Check(f"certificate, {name}", f"at most {bound:g}", report, _certificate(sampled, name, bound))
            for name, bound in CERTIFICATE_BOUNDS.items()
        ),
        Check(
            "rolling window",
            "fewer evaluations than tokens, and its certificate",
            "Use --method sequential, and report this line.",
            lambda: window(sampled),
        ),
        Check(
            "noise floor",
            f"at most {FLOOR_ROUNDINGS} roundings, {FLOOR_EVALUATIONS} evaluations a block more than float32, "
            f"certificate {FLOOR_CERTIFICATE:g} floors",
            "Use --method sequential in half precision, and report this line.",
            lambda: noise_floor(sampled),
        ),
        Check("exact likelihood", at_most(NLL_BOUNDS) + " nats", report, lambda: likelihood(sampled)),
        Check("round trip", f"at most {ROUND_TRIP:g}", "Encode and edit with --dtype float32.", round_trip),
        Check(
            "memory plan",
            "no phase takes more than planned",
            "Report this line, and use --low-memory: more than planned is needed.",
            memory_plan,
        ),
    ]


Sampler = Callable[[mx.Dtype, Method], Sampled]


def _sample(dtype: mx.Dtype, method: str) -> Sampled:
    """With dense weights, as larger models in this precision have them; those of the embedded model have 8 bits."""
    with warnings.catch_warnings():
        # That its sampling plan is for float32 concerns nobody here: the method is given.
        warnings.filterwarnings("ignore", ".* was measured in .* and is ignored in ")
        pipe = load("demo", dtype=dtype)
    flow = pipe.flow
    assert isinstance(flow, STARFlow)
    dequantize_module(flow)
    cast_weights(flow, dtype)
    result = pipe.generate(PROMPT, seed=SEED, method=method, verify=True)
    certificate = result.stats.certificate
    assert certificate is not None
    out = flow(result.latents, pipe.encode_prompts([PROMPT]))
    return Sampled(result.images[0], certificate, float(out.nll()[0]), result.stats.evaluations)


def means(image: Image.Image) -> np.ndarray:
    """`[CELLS, CELLS, 3]`, in levels of 255."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    side = pixels.shape[0] // CELLS
    return pixels.reshape(CELLS, side, CELLS, side, 3).mean((1, 3))


def expected_means() -> np.ndarray:
    levels = np.frombuffer(bytes.fromhex("".join(IMAGE_MEANS.split())), np.uint8)
    return levels.reshape(CELLS, CELLS, 3).astype(np.float64)


def images(sampled: Sampler) -> Finding:
    errors = {}
    for name, dtype in MLX_DTYPES.items():
        difference = means(sampled(dtype, "sequential").image) - expected_means()
        errors[name] = float(np.sqrt(np.mean(difference**2)))
    return within(errors, IMAGE_BOUNDS, ".2f")


def _certificate(sampled: Sampler, name: str, bound: float) -> Callable[[], Finding]:
    def look() -> Finding:
        certificate = sampled(MLX_DTYPES[name], "sequential").certificate
        return Finding(str(certificate), certificate.max <= bound, {"max": certificate.max, "rms": certificate.rms})

    return look


def window(sampled: Sampler) -> Finding:
    dtype = automatic_dtype(quantized_flow=True)
    name, one = dtype_name(dtype), sampled(dtype, "rolling")
    tokens = sampled(dtype, "sequential").evaluations
    good = sum(one.evaluations) < sum(tokens) and one.certificate.max <= WINDOW_BOUNDS[name]
    counts = "+".join(map(str, one.evaluations))
    return Finding(
        f"{counts} of {'+'.join(map(str, tokens))} evaluations in {name}, {one.certificate}",
        good,
        {"evaluations": float(sum(one.evaluations)), "max": one.certificate.max},
    )


def noise_floor(sampled: Sampler) -> Finding:
    """A window in half precision converges as in float32, down to what it measures that the precision resolves."""
    whole = sampled(mx.float32, "rolling").evaluations
    most = sum(whole) + FLOOR_EVALUATIONS * len(whole)
    parts, values, good = [], {"evaluations_float32": float(sum(whole))}, True
    for dtype, rounding in HALF.items():
        name, one = dtype_name(dtype), sampled(dtype, "rolling")
        floor, count = one.certificate.noise_floor or 0.0, sum(one.evaluations)
        bound = FLOOR_CERTIFICATE * floor if floor else WINDOW_BOUNDS[name]
        good &= count <= most and floor <= FLOOR_ROUNDINGS * rounding and one.certificate.max <= bound
        parts.append(f"{name} {floor:.1e} ({floor / rounding:.0f} roundings, {count} evaluations)")
        values |= {f"floor_{name}": floor, f"evaluations_{name}": float(count)}
    return Finding(f"{', '.join(parts)}; {sum(whole)} in float32", good, values)


def likelihood(sampled: Sampler) -> Finding:
    errors = {name: abs(sampled(dtype, "sequential").nll - NLL) for name, dtype in MLX_DTYPES.items()}
    return within(errors, NLL_BOUNDS)


def round_trip() -> Finding:
    pipe = load("demo")
    _, errors = pipe.encode([Image.new("RGB", pipe.size, "white")], "a rocket on a white background")
    assert errors is not None
    return Finding(f"{errors.flow_max:.1e} of latents", errors.flow_max <= ROUND_TRIP, {"flow_max": errors.flow_max})


def room() -> Finding:
    needed, there = plan(ModelDirectory.find("demo")).peak(), available()
    return Finding(
        f"{needed / 2**20:.0f} MiB of {there / 2**30:.1f} GiB that networks may use",
        needed <= there,
        {"needed": float(needed), "available": float(there)},
    )


def memory_plan() -> Finding:
    planned = plan(ModelDirectory.find("demo")).phases()
    mx.clear_cache()
    before = mx.get_active_memory()
    measured = load("demo").generate(PROMPT, seed=SEED).stats.memory
    used = {phase: float(measured[phase] - before) for phase in planned if phase in measured}
    parts = [f"{phase} {size / 2**20:.0f} of {planned[phase] / 2**20:.0f}" for phase, size in used.items()]
    good = bool(used) and all(0 < size <= planned[phase] for phase, size in used.items())
    return Finding(", ".join(parts) + " MiB", good, used)
