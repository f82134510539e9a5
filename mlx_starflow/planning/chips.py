"""How long an image should take on Apple's chips: an estimate from published figures, not a measurement.

A phase is taken to last as long as the slower of two things: moving its bytes at the chip's published memory bandwidth,
and computing at the GPU's peak rate. No program reaches either, so real runs take longer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.weights import MLX_DTYPES
from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.planning.footprint import convolutions
from mlx_starflow.planning.memory import AS_STORED, ModelConfigs, parameter_count, plans
from mlx_starflow.planning.traffic import cache_bytes, evaluation_bytes, evaluation_weights, tokens_at_once
from mlx_starflow.sampling.methods import SamplingPlan

OPERATIONS = 256
"""Of a GPU core in a cycle: 128 multiplications and additions. Half precision is not faster than float32 (measured on
M1 and M2: github.com/philipturner/metal-benchmarks); the matrix units of M5 GPUs are not counted."""


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        family: its name.
        cores: of its GPU.
        bandwidth: of its memory, 10^9 bytes a second.
        clock: of its GPU, 10^9 cycles a second.
        memory: the most that it comes with, GB.
    """

    family: str
    cores: int
    bandwidth: float
    clock: float
    memory: int

    @property
    def name(self) -> str:
        alone = sum(chip.family == self.family for chip in CHIPS) == 1
        return self.family if alone else f"{self.family} {self.cores}-core"

    @property
    def tflops(self) -> float:
        """Peak rate of the GPU, 10^12 operations a second."""
        return self.cores * OPERATIONS * self.clock / 1000

    def seconds(self, moved: float, operations: float) -> float:
        """The longer time of moving bytes and of computing."""
        return max(moved / (self.bandwidth * 1e9), operations / (self.tflops * 1e12))


CHIPS = (
    Chip("M1", 8, 68.25, 1.28, 16),
    Chip("M1 Pro", 16, 200, 1.30, 32),
    Chip("M1 Max", 32, 400, 1.30, 64),
    Chip("M1 Ultra", 64, 800, 1.30, 128),
    Chip("M2", 10, 100, 1.40, 24),
    Chip("M2 Pro", 19, 200, 1.40, 32),
    Chip("M2 Max", 38, 400, 1.40, 96),
    Chip("M2 Ultra", 76, 800, 1.40, 192),
    Chip("M3", 10, 100, 1.38, 24),
    Chip("M3 Pro", 18, 150, 1.38, 36),
    Chip("M3 Max", 30, 300, 1.38, 96),
    Chip("M3 Max", 40, 400, 1.38, 128),
    Chip("M3 Ultra", 80, 819, 1.38, 512),
    Chip("M4", 10, 120, 1.58, 32),
    Chip("M4 Pro", 20, 273, 1.58, 64),
    Chip("M4 Max", 32, 410, 1.58, 36),
    Chip("M4 Max", 40, 546, 1.58, 128),
    Chip("M5", 10, 153, 1.62, 32),
    Chip("M5 Pro", 20, 307, 1.62, 64),
    Chip("M5 Max", 32, 460, 1.62, 36),
    Chip("M5 Max", 40, 614, 1.62, 128),
)
"""Bandwidth, GPU cores (of the largest GPU with this bandwidth) and memory: technical specifications of Apple's Macs
(support.apple.com/specs) and announcements of the chips. Apple has published peak rates of M1 and M2 GPUs only (2.6 and
3.6 TFLOPS), which these clocks give; clocks of later ones are what owners read from powermetrics, good to a tenth."""


def find_chips(name: str) -> list[Chip]:
    """The chips that a name stands for: "M4", "Apple M3 Max" (there are two), "M3 Max 40-core".

    Raises:
        StarflowError: no chip is called that.
    """
    wanted = re.sub(r"^apple |[()]", "", " ".join(name.lower().split()))
    found = [chip for chip in CHIPS if wanted in (chip.family.lower(), f"{chip.family} {chip.cores}-core".lower())]
    if not found:
        known = ", ".join(dict.fromkeys(chip.family for chip in CHIPS))
        raise StarflowError(f"unknown chip {name!r}; known are {known}")
    return found


Cost = tuple[float, float]
"""Bytes moved, and operations computed."""


@dataclass(frozen=True)
class Sampling:
    """How often the network of each block is evaluated for an image, and on how many tokens at once; data side
    first."""

    evaluations: Sequence[float]
    tokens: Sequence[int]

    @classmethod
    def sequential(cls, blocks: int, length: int) -> Sampling:
        return cls([length] * blocks, [1] * blocks)

    @classmethod
    def of_plan(cls, found: SamplingPlan, length: int) -> Sampling | None:
        """What tuning measured; None if the plan does not say, or was measured with videos."""
        counts = found.measured.get("evaluations")
        if found.frame or not isinstance(counts, list) or len(counts) != len(found.blocks):
            return None
        return cls([float(count) for count in counts[::-1]], [tokens_at_once(each, length) for each in found.blocks])


def weight_costs(flow: STARFlow, sampling: Sampling, copies: int, dtype: mx.Dtype) -> list[Cost]:
    """Of each block: an evaluation reads all of its weights, whatever its number of tokens.

    Args:
        flow: dense or quantized; nothing of it is computed.
        copies: sequences at once in blocks that read text, 2 with guidance.
        dtype: of weights that are not quantized.
    """
    costs = []
    blocks = zip(flow.blocks, matrix_sizes(flow.config), sampling.evaluations, sampling.tokens, strict=True)
    for block, size, count, tokens in blocks:
        rows = tokens * (copies if block.config.txt_dim else 1)
        costs.append((count * evaluation_bytes(block, dtype), 2.0 * size * count * rows))
    return costs


def cache_costs(config: FlowConfig, length: int, sampling: Sampling, copies: int, dtype: mx.Dtype) -> list[Cost]:
    """Of each block: an evaluation reads the keys and values of the text and of the tokens before; on average those
    of half the tokens."""
    costs = []
    for block, count, tokens in zip(config.blocks, sampling.evaluations, sampling.tokens, strict=True):
        prefix, rows = (config.txt_size, copies) if block.txt_dim else (0, 1)
        read = cache_bytes(block, prefix, length, rows, dtype.size) * count / length
        positions = prefix + (length + 1) / 2
        attention = 4.0 * block.num_layers * block.num_heads * block.head_dim * rows * tokens * positions
        costs.append((read, count * attention))
    return costs


def score_costs(flow: STARFlow, length: int, dtype: mx.Dtype) -> list[Cost]:
    """Of each block, for the score step: forwards, forwards again and backwards, the last twice for attention, which
    then computes its masked half too."""
    costs = []
    for block, size in zip(flow.blocks, matrix_sizes(flow.config), strict=True):
        config = block.config
        positions = length + (flow.config.txt_size if config.txt_dim else 0)
        attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * positions**2
        costs.append((3.0 * evaluation_bytes(block, dtype), 3 * 2.0 * size * positions + 4 * attention))
    return costs


def text_cost(config: T5Config, tokens: int, weights: int, dtype: mx.Dtype) -> Cost:
    """Of encoding prompt and empty prompt, of `tokens` positions each; rows of the embedding are looked up."""
    table = config.vocab_size * config.d_model
    return weights - table * dtype.size, 2.0 * (parameter_count(T5Encoder(config)) - table) * 2 * tokens


def decode_cost(config: AutoencoderKLConfig, height: int, width: int, weights: int) -> Cost:
    """Of the decoder's convolutions and of its attention, for latents of `height` x `width`."""
    operations = sum(
        2.0 * 9 * each.inputs * each.outputs * each.height * each.width for each in convolutions(config, height, width)
    )
    if config.mid_block_add_attention:
        operations += 4.0 * config.block_out_channels[-1] * (height * width) ** 2
    return weights, operations


def matrix_sizes(config: FlowConfig) -> list[int]:
    """Numbers in the matrices that every evaluation of each block multiplies with."""
    blocks = STARFlow(config).blocks
    return [sum(w.size for w in evaluation_weights(block).values() if w.ndim == 2) for block in blocks]


def estimate(configs: ModelConfigs, chip: Chip, size: tuple[int, int] | None = None) -> dict[str, dict[str, float]]:
    """Seconds that each phase of making one image takes, at every precision that fits the chip's memory.

    Args:
        configs: of the model; a sampling plan in its directory is estimated too.
        size: (width, height) of the image in pixels; None: what the model was trained at.

    Returns:
        {precision: {phase: seconds}} with the phases of `PHASES`, of which the last two are there if there is a plan.

    Raises:
        StarflowError: the size does not fit the model.
    """
    config, vae = configs.flow, configs.vae
    if not isinstance(vae, AutoencoderKLConfig):
        raise StarflowError("times are estimated for models of images, and this one makes videos")
    width, height = (side // vae.downscale for side in size or (config.img_size * vae.downscale,) * 2)
    length = (width // config.patch_size) * (height // config.patch_size)
    copies = 2 if configs.guidance > 0 else 1
    found = SamplingPlan.find(configs.directory.path) if configs.directory else None
    planned = Sampling.of_plan(found, length) if found else None

    def seconds(costs: Sequence[Cost]) -> float:
        return sum(chip.seconds(*cost) for cost in costs)

    figures = {}
    for name, expected in plans(configs, size=size).items():
        if not expected.fits(chip.memory, low_memory=True):
            continue
        half = mx.float32 if name == "float32" else mx.float16
        flow, dtype = _stored_in(configs, name)
        encoder, decoder = expected.weights["text encoder"], expected.weights["autoencoder"]

        def sampled(sampling: Sampling, flow: STARFlow = flow, dtype: mx.Dtype = dtype) -> tuple[float, float]:
            weights = weight_costs(flow, sampling, copies, dtype)
            return seconds(weights), seconds(cache_costs(config, length, sampling, copies, dtype))

        phases = {
            "text encoder": seconds([text_cost(configs.text_encoder, config.txt_size, encoder, half)]),
            "score step": seconds(score_costs(flow, length, dtype)),
            "decoder": seconds([decode_cost(vae, height, width, decoder)]),
        }
        others = sum(phases.values())
        phases["weights"], phases["KV cache"] = one = sampled(Sampling.sequential(len(config.blocks), length))
        phases["picture"] = others + sum(one)
        if planned:
            phases["plan"] = sum(sampled(planned))
            phases["picture with plan"] = others + phases["plan"]
        figures[name] = phases
    return figures


PHASES = {
    "text encoder": "text encoder",
    "weights": "sampling: weights",
    "KV cache": "sampling: KV cache",
    "score step": "score step",
    "decoder": "decoder",
    "picture": "one picture",
    "plan": "sampling with the plan",
    "picture with plan": "one picture with it",
}
"""Phases of `estimate`, and what a report calls them. Sampling is sequential but for the last two."""


def _stored_in(configs: ModelConfigs, precision: str) -> tuple[STARFlow, mx.Dtype]:
    """The flow in one of the precisions of `plans`, none of it computed, and the dtype of what is not quantized."""
    if precision == AS_STORED and configs.directory:
        stored = configs.directory.flow.lazy()
        assert isinstance(stored, STARFlow)
        return stored, mx.float32
    flow = STARFlow(configs.flow)
    if not precision.endswith(" bit"):
        return flow, MLX_DTYPES[precision]
    quantize_module(flow, precision.removesuffix(" bit"))
    return flow, mx.float32


def time_report(configs: ModelConfigs, chip: Chip, size: tuple[int, int] | None = None) -> list[str]:
    """`estimate` as lines of text."""
    figures = estimate(configs, chip, size)
    width, height = size or (configs.flow.img_size * configs.vae.downscale,) * 2
    lines = [
        f"Estimate, not measured: seconds for one picture of {width}x{height} on {chip.name}, "
        f"guidance {configs.guidance:g}, at every precision that fits",
        f"into {chip.memory} GB, the most it comes with. The longer of moving bytes at {chip.bandwidth:g} GB/s and of "
        f"computing at {chip.tflops:.1f} TFLOPS",
        f"({chip.cores} GPU cores): published peaks, which no program reaches. Starting kernels, which small models "
        "feel, is left out.",
    ]
    if not figures:
        return [*lines, "No precision fits."]
    lines += ["", f"{'seconds':<26}" + "".join(f"{name:>14}" for name in figures)]
    for phase, title in PHASES.items():
        if cells := [f"{phases[phase]:14.3g}" for phases in figures.values() if phase in phases]:
            lines.append(f"  {title:<24}" + "".join(cells))
    return lines
