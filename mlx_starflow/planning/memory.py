"""How much memory generating takes, computed from a model's configs.

Weights and caches are counted exactly; `footprint` has the formulas of the rest, upper estimates. Tests hold them
against what MLX's CPU backend takes; on Metal, whose convolutions gather no copies and whose attention holds no
weights, they are further above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.convert.official import RELEASES, released_arguments
from mlx_starflow.convert.vae import SD_VAE
from mlx_starflow.convert.wan import WAN_VAE
from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.memory import usable
from mlx_starflow.media.buckets import VIDEO_RATIO, bucket_size
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.weights import automatic_dtype, forget_draws, parameters, parse_dtype
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.models.configs import PIPELINE
from mlx_starflow.models.flow import BlockConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.models.tarflow import PixelFlow
from mlx_starflow.planning import footprint
from mlx_starflow.planning.traffic import cast_bytes
from mlx_starflow.sampling.cache import KVBits

PARTS = {"text encoder": "text_encoder", "flow": "flow", "autoencoder": "vae"}
"""The networks of a model, and what they are called in code."""

PHASES = {
    "text": "text encoder",
    "flow": "flow",
    "verify": "flow",
    "denoise": "flow",
    "decode": "autoencoder",
}
"""The phases of generating, as in `GenerationStats`, and the network that each of them runs."""

PRECISIONS = ("float32", "float16", "8", "6", "4")
"""What flows are held in: dtypes, and bits of quantized weights."""

HALF = "float16"
"""What networks beside a quantized flow compute in on a GPU: see `precision.automatic`."""


def packed_dtype(flow: FlowConfig) -> str:
    """What a quantized flow computes in on a GPU: see `precision.automatic`."""
    return HALF if flow.video else "float32"


AS_STORED = "as stored"

NETWORKS: dict[str, dict[str, Any]] = {
    "google/flan-t5-xl": {
        "vocab_size": 32128,
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_heads": 32,
        "feed_forward_proj": "gated-gelu",
    },
    "stabilityai/sd-vae-ft-ema": SD_VAE,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": WAN_VAE,
}
"""Configs of the networks that official flows go with."""


@dataclass(frozen=True)
class ModelConfigs:
    """The three networks of a model of images or videos; `directory` if they are on disk."""

    flow: FlowConfig
    text_encoder: T5Config
    vae: AutoencoderKLConfig | AutoencoderWanConfig
    directory: ModelDirectory | None = None
    guidance: float = 0.0
    sizes: dict[tuple[object, ...], int] = field(default_factory=dict, compare=False, repr=False)
    """Bytes of weights that have been counted, which takes most of the time of a plan."""

    @classmethod
    def read(cls, directory: str | Path | ModelDirectory) -> ModelConfigs:
        """Of a model directory. Raises StarflowError if a `config.json` is missing or not usable."""
        directory = directory if isinstance(directory, ModelDirectory) else ModelDirectory(directory)
        flow = directory.flow.config
        if not isinstance(flow, FlowConfig):
            raise StarflowError(f"{directory.path} reads no prompts: its memory is planned by plan_classes")
        guidance = PIPELINE.typed("guidance", "float", directory.pipeline.get("guidance", flow.cfg))
        return cls(flow, directory.text_encoder.config, directory.vae.config, directory, guidance)

    @classmethod
    def of_release(cls, repository: str) -> ModelConfigs:
        """Of an official release, "apple/starflow", from what is known about it. Raises StarflowError."""
        release = RELEASES.get(repository.lower())
        if release is None:
            raise StarflowError(f"unknown release {repository!r}: it must be {', '.join(RELEASES)}")
        text_encoder = T5Config.from_dict(NETWORKS[release.text_encoder])
        arguments = dict(released_arguments(Path(release.checkpoint)) or {}) | {"txt_dim": text_encoder.d_model}
        network = NETWORKS[release.vae_repository]
        vae = (AutoencoderWanConfig if network is WAN_VAE else AutoencoderKLConfig).from_dict(network)
        flow = FlowConfig.from_official(arguments)
        return cls(flow, text_encoder, vae, None, release.pipeline.get("guidance", flow.cfg))

    def networks(self) -> dict[str, nn.Module]:
        """The networks by part, newly made; nothing of them is computed, so they take no memory."""
        vae = self.vae
        made = {
            "text encoder": T5Encoder(self.text_encoder),
            "flow": STARFlow(self.flow),
            "autoencoder": AutoencoderKL(vae) if isinstance(vae, AutoencoderKLConfig) else AutoencoderWan(vae),
        }
        forget_draws()
        return made

    def weights(self, chosen: Mapping[str, int | str], dtypes: Mapping[str, mx.Dtype]) -> dict[str, int]:
        """Bytes of each part's weights in its dtype, quantized where it is `chosen`, else as they are stored.

        Raises StarflowError if a network cannot be quantized so.
        """
        keys = {part: (part, chosen.get(part), dtypes[part], self.directory is not None) for part in PARTS}
        if missing := [part for part in PARTS if keys[part] not in self.sizes]:
            networks = self.networks()
            for part in missing:
                dtype = dtypes[part]
                counted = None if part in chosen else _stored_bytes(self, part, dtype)
                if counted is None:
                    counted = weight_bytes(networks[part], chosen.get(part) or dtype, dtype)
                self.sizes[keys[part]] = counted
        return {part: self.sizes[key] for part, key in keys.items()}


@dataclass(frozen=True)
class MemoryPlan:
    """What generating will take, in bytes.

    Attributes:
        weights: of each network, by part ("text encoder", "flow", "autoencoder").
        kv_cache: of keys and values, at most; part of the flow phase's activations.
        activations: of each phase ("text", "flow", "verify", "denoise", "decode"), what it takes besides weights;
            videos are not verified.
        others: of a phase, what others hold meanwhile where all take turns, as in a video whose frames are shown as
            they are finished.
    """

    weights: dict[str, int]
    kv_cache: int
    activations: dict[str, int]
    others: dict[str, int] = field(default_factory=dict)

    def phases(self, low_memory: bool = False) -> dict[str, int]:
        """The peak of each phase, with all networks in memory or, with `low_memory`, the phase's own alone."""
        everything = sum(self.weights.values())
        return {
            phase: self.activations[phase]
            + (self.weights[part] if low_memory else everything + self.others.get(phase, 0))
            for phase, part in PHASES.items()
            if phase in self.activations
        }

    def peak(self, low_memory: bool = False) -> int:
        """The highest peak of all phases."""
        return max(self.phases(low_memory).values())

    def split(self, ranks: int) -> MemoryPlan:
        """Of one of the processes that compute the flow together, see `tensor_parallel`: activations as for all."""
        return replace(self, weights={**self.weights, "flow": self.weights["flow"] // ranks})

    def fits(self, gigabytes: float, low_memory: bool = False) -> bool:
        """Whether a Mac of this much memory (GiB) runs it: see `usable`."""
        return self.peak(low_memory) <= usable(gigabytes * 2**30)


def plan(
    model: str | Path | ModelDirectory | ModelConfigs,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    frames: int | None = None,
    guidance: float | None = None,
    dtype: str | mx.Dtype | None = None,
    flow_dtype: str | mx.Dtype | None = None,
    quantization: int | str | Mapping[str, int | str] | None = None,
    kv_bits: KVBits = 0,
) -> MemoryPlan:
    """Predict the memory of generating from a model's configs.

    Args:
        model: a model directory, or its configs.
        size: (width, height) of the images or videos in pixels; None: what the model was trained at.
        batch: images or videos at once.
        frames: of videos; None: as many as the model was trained at. All longer ones take the same.
        guidance: its weight; guided blocks see everything twice. None: the model's own.
        dtype: of the networks; None or "auto": what `precision.automatic` says.
        flow_dtype: of the flow, if it is another one.
        quantization: of the flow, as `convert --quantize` takes it, or of each part by its name; None: as stored.
        kv_bits: of keys and values, see `cache.KVBits`; 0: as the flow computes them.

    Raises:
        StarflowError: a config is missing or not usable, a network cannot be quantized so, or the size does not fit.
    """
    configs = model if isinstance(model, ModelConfigs) else ModelConfigs.read(model)
    if quantization is not None and not isinstance(quantization, Mapping):
        quantization = {"flow": quantization}
    chosen = dict(quantization or {})
    if unknown := set(chosen) - set(PARTS):
        raise StarflowError(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    packed = "flow" in chosen or bool(configs.directory and configs.directory.flow.quantization)
    own = parse_dtype(flow_dtype) or parse_dtype(dtype)
    own = own or automatic_dtype(quantized_flow=packed and not configs.flow.video)
    others_dtype = parse_dtype(dtype) or automatic_dtype()
    weights = configs.weights(chosen, {part: own if part == "flow" else others_dtype for part in PARTS})
    item, cached = others_dtype.size, own.size
    flow, vae = configs.flow, configs.vae
    scale = vae.downscale
    step = scale * flow.patch_size
    width, height = size or trained_size(flow, vae)
    if min(width, height) < step or width % step or height % step:
        raise StarflowError(f"a size of {width}x{height} does not fit: this model wants multiples of {step} pixels")
    guided = (configs.guidance if guidance is None else guidance) > 0
    tokens = (width // scale // flow.patch_size) * (height // scale // flow.patch_size)
    # Embeddings of the prompts and of no prompt, and of each image's prompt once more.
    held = (batch + 2) * flow.txt_size * flow.txt_dim * item
    others: dict[str, int] = {}
    text = footprint.text(configs.text_encoder, 2, flow.txt_size, item)
    if flow.video and isinstance(vae, AutoencoderWanConfig):
        trained = vae.latent_frames(flow.video[0])
        window = min(trained, vae.latent_frames(frames or flow.video[0]))
        longer = vae.latent_frames(frames or flow.video[0]) > trained
        kv_cache, sampling = footprint.frame_sampling(
            flow, tokens, window, batch, guided, cached, kv_bits, longer=longer
        )
        kept, cleaning = footprint.cleaning(flow, tokens, window, batch, cached)
        decoding = batch * footprint.decode_video(vae, height // scale, width // scale, item)
        activations = {
            "text": text,
            "flow": held + sampling,
            "denoise": held + cleaning,
            "decode": held + decoding,
        }
        state = batch * footprint.decoder_state(vae, height // scale, width // scale, item)
        others = {"flow": state + kept, "denoise": state + kv_cache, "decode": kv_cache + kept}
    elif not isinstance(vae, AutoencoderKLConfig):
        raise StarflowError("the flow makes images and the autoencoder beside it videos; take another one")
    else:
        kv_cache, sampling = footprint.sampling(flow, tokens, batch, guided, cached, kv_bits)
        activations = {
            "text": text,
            "flow": held + sampling,
            "verify": held + footprint.forward(flow, tokens, batch, guided),
            "denoise": held + footprint.score(flow, tokens, batch),
            "decode": held + footprint.decode(vae, height // scale, width // scale, batch, item),
        }
    for phase, part in PHASES.items():
        if part not in chosen and phase in activations:
            there_and_back = phase == "denoise" and not flow.video  # the score step
            activations[phase] += (2 if there_and_back else 1) * _unpacked(configs, part)
    return MemoryPlan(weights, kv_cache, activations, others)


def plans(
    configs: ModelConfigs,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    frames: int | None = None,
    kv_bits: KVBits = 0,
) -> dict[str, MemoryPlan]:
    """The plan of each precision that the model's layers can be stored in; arguments and errors as `plan`'s.

    Names are dtypes, "8 bit" and the like, and "as stored" of a quantized model.
    """
    packed = packed_dtype(configs.flow)
    expect = partial(plan, size=size, batch=batch, frames=frames, kv_bits=kv_bits)
    dense = replace(configs, directory=None)

    def at(precision: str, bits: str | None) -> MemoryPlan:
        if bits:
            return expect(dense, dtype=HALF, flow_dtype=packed, quantization=bits)
        return expect(dense, dtype=precision, flow_dtype=precision)

    stored = {}
    if configs.directory is not None and configs.directory.flow.quantization:
        stored[AS_STORED] = expect(configs, dtype=HALF, flow_dtype=packed)
    return stored | each_precision(at)


def each_precision(expect: Callable[[str, str | None], MemoryPlan]) -> dict[str, MemoryPlan]:
    """Plans by the names of `plans`, from a precision and, if it is a quantized one, its bits.

    Raises StarflowError if one that is not quantized fails; quantized ones that a network does not have are left out.
    """
    found = {}
    for precision in PRECISIONS:
        bits = precision if precision.isdigit() else None
        try:
            found[f"{bits} bit" if bits else precision] = expect(precision, bits)
        except StarflowError:
            if not bits:
                raise
    return found


def trained_size(flow: FlowConfig, vae: AutoencoderKLConfig | AutoencoderWanConfig) -> tuple[int, int]:
    """(width, height) in pixels of what a model makes unless told otherwise: squares, or videos of `VIDEO_RATIO`."""
    ratio = VIDEO_RATIO if flow.video and flow.mix_aspect else "1:1"
    return bucket_size(ratio, flow.img_size * vae.downscale, vae.downscale * flow.patch_size)


def weight_bytes(network: nn.Module, precision: int | str | mx.Dtype, dtype: mx.Dtype | None = None) -> int:
    """Bytes of a network's weights in a dtype, or quantized to bits (or as `quantize_module` takes it).

    The network is only looked at; if it is quantized here, it is a quantized one afterwards. What quantization leaves
    as it is counts as `dtype`, by default bfloat16.
    """
    if precision in ("float32", "bfloat16", "float16") or isinstance(precision, mx.Dtype):
        dtype = parse_dtype(precision)
    else:
        quantize_module(network, precision)
    return _bytes(parameters(network), dtype or mx.bfloat16, isinstance(network, STARFlow | PixelFlow))


def parameter_count(network: nn.Module) -> int:
    """Numbers in a dense network's weights."""
    return sum(value.size for value in parameters(network).values())


def _bytes(arrays: Mapping[str, mx.array], dtype: mx.Dtype, of_flow: bool) -> int:
    """Bytes of arrays when floating ones are cast to `dtype`, a flow's as `weights.weight_dtypes` says; nothing is
    computed."""
    return sum(cast_bytes(name, array, dtype, of_flow) for name, array in arrays.items())


def _stored_bytes(configs: ModelConfigs, part: str, dtype: mx.Dtype) -> int | None:
    """Of a quantized part of a model directory, from its files' headers; None of a dense one."""
    if configs.directory is None:
        return None
    network = getattr(configs.directory, PARTS[part])
    return _bytes(network.weights(), dtype, part == "flow") if network.quantization else None


def _unpacked(configs: ModelConfigs, part: str) -> int:
    """What the CPU holds of quantized weights in float32, see `quantization.QuantizedLinear`: those of two layers.

    They are let go of one after another, but MLX takes memory for as many as ten operations ahead of the one it
    computes, which is more than a layer has.
    """
    if mx.default_device() != mx.cpu or part == "autoencoder" or _stored_bytes(configs, part, mx.float32) is None:
        return 0
    text = configs.text_encoder
    if part == "flow":
        return unpacked_layers(configs.flow.blocks)
    return 2 * 4 * text.d_model * (4 * text.num_heads * text.d_kv + 3 * text.d_ff)


def unpacked_layers(blocks: Sequence[BlockConfig]) -> int:
    """Bytes of the weights of two layers of a flow in float32."""
    layers = (
        block.channels * (4 * block.num_heads * block.head_dim + 2 * block.channels * block.expansion)
        for block in blocks
    )
    return 2 * 4 * max(layers)
