"""PyTorch reference of `mlx_starflow.sampling`: KV cache, sequential and Jacobi inversion, guidance, denoising.

Like the MLX code, and unlike the official release, it caches keys after their rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import LEAST_SCALE, GuidanceMode, GuidanceTarget
from mlx_starflow.reference.flow import Condition, FlowBlock
from mlx_starflow.reference.itarflow import ITarFlow
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.tarflow import PixelFlow
from mlx_starflow.sampling.guidance import SamplingOptions, guidance_function
from mlx_starflow.sampling.methods import JacobiSettings, SequentialSettings
from mlx_starflow.sampling.progress import Watch, watch

if TYPE_CHECKING:
    from mlx_starflow.sampling import SamplingTrace

METHODS: dict[str, type[SequentialSettings | JacobiSettings]] = {
    kind.name: kind for kind in (SequentialSettings, JacobiSettings)
}


class KVCache:
    """Keys (already rotated) and values of one layer, for exactly as many positions as the sequence has."""

    def __init__(self, length: int):
        self.length, self.offset = length, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update_and_fetch(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B, heads, n, D]` and return all that is cached, `[B, heads, offset, D]`."""
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    def trim(self, n: int) -> None:
        """Forget the last `n` positions."""
        self.offset -= min(n, self.offset)


def starflow_guidance(
    mu: Tensor, log_sigma: Tensor, mu_null: Tensor, log_sigma_null: Tensor, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """STARFlow's guidance (arXiv 2506.06276); see `kernels.affine.starflow_guidance`."""
    excess = weight * -torch.expm1(2 * (log_sigma - log_sigma_null).clamp(max=0))
    guided = mu + (weight - excess) / (1 + excess) * (mu - mu_null)
    return guided, log_sigma - 0.5 * torch.log1p(excess)


def tarflow_guidance(
    mu: Tensor,
    log_sigma: Tensor,
    mu_null: Tensor,
    log_sigma_null: Tensor,
    weight: float | Tensor,
    target: GuidanceTarget = "ab",
) -> tuple[Tensor, Tensor]:
    """TarFlow's guidance (arXiv 2412.06329): mean ("b") and log-scale ("a") move away from the null's by `weight`."""
    if "b" in target:
        mu = mu + weight * (mu - mu_null)
    if "a" in target:
        log_sigma = log_sigma + weight * (log_sigma - log_sigma_null)
    return mu, log_sigma


def itarflow_guidance(
    mu: Tensor,
    log_sigma: Tensor,
    mu_null: Tensor,
    log_sigma_null: Tensor,
    weight: float | Tensor,
    target: GuidanceTarget = "ab",
) -> tuple[Tensor, Tensor]:
    """iTARFlow's guidance (arXiv 2604.20041): the same with sigma itself; see `kernels.affine.itarflow_guidance`."""
    if "b" in target:
        mu = mu + weight * (mu - mu_null)
    if "a" in target:
        growth = -weight * torch.expm1(log_sigma_null - log_sigma)
        log_sigma = log_sigma + torch.log1p(growth.clamp(min=LEAST_SCALE - 1))
    return mu, log_sigma


@dataclass
class Guidance:
    """How conditional and null predictions are combined. `annealed` grows the weight linearly over the sequence."""

    combine: Callable[..., tuple[Tensor, Tensor]]
    weight: float
    annealed: bool = False

    def at(self, start: int, count: int, total: int, device: torch.device) -> float | Tensor:
        if not self.annealed:
            return self.weight
        return self.weight * (torch.arange(start + 1, start + count + 1, device=device) / total)[None, :, None]


class BlockDecoder:
    """Predicts (mu, log sigma) of tokens from the tokens before them, in the block's order.

    With guidance the network sees the batch twice, once with the null condition, in one evaluation.

    Attributes:
        first: number of the first token that is predicted (1 if the first one passes unchanged).
        evaluations: how often the network was run.
    """

    cache_type = KVCache

    def __init__(
        self,
        block: FlowBlock,
        batch: int,
        length: int,
        rope_frequencies: Tensor | None,
        condition: Condition,
        guidance: Guidance | None,
        temperature: float | Tensor = 1.0,
    ):
        self.block, self.length, self.guidance, self.temperature = block, length, guidance, temperature
        self.copies = 2 if guidance else 1
        self.offset = condition.offset
        self.start = block.first_input(batch * self.copies)
        self.first = 0 if self.start is not None else 1
        self.prefix_length = 0 if condition.prefix is None else condition.prefix.shape[1]
        positions = self.prefix_length + length
        self.rope_frequencies = (
            None if rope_frequencies is None else block.rope_frequencies(rope_frequencies, positions)
        )
        self.caches = [self.cache_type(positions) for _ in block.layers]
        self.evaluations = 0
        if condition.prefix is not None:
            self._transform(condition.prefix)

    @property
    def known(self) -> int:
        """How many inputs the cache holds, the start token included."""
        return self.caches[0].offset - self.prefix_length

    def _transform(self, h: Tensor) -> Tensor:
        start = self.caches[0].offset
        rope_frequencies = None if self.rope_frequencies is None else self.rope_frequencies[start : start + h.shape[1]]
        return self.block.transform(h, rope_frequencies, self.caches, self.temperature)

    def predict(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(mu, log sigma) `[B, stop - start, C]` of tokens `start` to `stop`, given the tokens x `[B, N, C]`.

        The cache must hold exactly the inputs before those that are needed, and holds them too afterwards.
        """
        self.evaluations += 1
        inputs = x[:, max(start - 1, 0) : stop - 1]
        if self.copies == 2:
            inputs = torch.cat([inputs, inputs])
        if start == 0:
            assert self.start is not None  # else the first token is not predicted
            inputs = torch.cat([self.start.to(inputs.dtype), inputs], dim=1)
        mu, log_sigma = self.block.affine(self._transform(self.block.embed(inputs, self.known, self.offset)))
        if self.guidance:
            (mu, mu_null), (log_sigma, log_sigma_null) = mu.chunk(2), log_sigma.chunk(2)
            weight = self.guidance.at(start - self.first, stop - start, self.length - self.first, x.device)
            mu, log_sigma = self.guidance.combine(mu, log_sigma, mu_null, log_sigma_null, weight)
        return mu, log_sigma

    def trim(self, n: int) -> None:
        """Forget the last `n` inputs."""
        for cache in self.caches:
            cache.trim(n)


def invert_jacobi(
    decoder: BlockDecoder,
    z: Tensor,
    x: Tensor,
    start: int,
    settings: JacobiSettings,
    advance: Callable[[int], None],
) -> Tensor:
    """Noise `[B, N, C]` in the block's order -> data in it; x holds its first `start` tokens.

    Block after block of tokens, each iterated from its noise until it stands still.
    """
    while start < z.shape[1]:
        stop = min(start + settings.block_size, z.shape[1])
        for sweep in range(settings.max_iterations):
            if sweep:
                decoder.trim(stop - start)
            mu, log_sigma = decoder.predict(x, start, stop)
            new, old = z[:, start:stop] * torch.exp(log_sigma) + mu, x[:, start:stop]
            last = sweep + 1 == settings.max_iterations
            still = last or not ((new - old).square().mean() / new.square().mean()).item() >= settings.threshold
            x[:, start:stop] = new
            if still:
                break
            advance(0)
        advance(stop - start)
        start = stop
    return x


def invert_block(
    decoder: BlockDecoder,
    z: Tensor,
    settings: SequentialSettings | JacobiSettings,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Invert one block: noise `[B, N, C]` -> data, both in data order."""
    z = decoder.block.permute(z)
    x, start = z.clone(), decoder.first
    if start:
        mu, log_sigma = decoder.block.unpredicted(z[:, :1])
        x[:, :1] = z[:, :1] * torch.exp(log_sigma) + mu
        advance(1)
    if isinstance(settings, SequentialSettings):
        settings = JacobiSettings(block_size=1, max_iterations=1)
    x = invert_jacobi(decoder, z, x, start, settings, advance)
    return decoder.block.unpermute(x)


def sample(
    flow: STARFlow | PixelFlow,
    z: Tensor,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    guidance: float = 0.0,
    method: str | SequentialSettings | JacobiSettings = "sequential",
    *,
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    guidance_target: GuidanceTarget = "ab",
    guidance_mode: GuidanceMode | None = None,
    guided_blocks: int | None = None,
    noise_level: float | None = None,
    progress: Watch = False,
    trace: SamplingTrace | None = None,
) -> Tensor:
    """Invert a STARFlow or TarFlow of PyTorch, noise -> data; arguments, result and errors are `mlx_starflow.sample`'s.

    `method` is "sequential" or "jacobi", or the settings of one of them.
    """
    SamplingOptions(guidance, attn_temp, annealed_guidance, guidance_target, guidance_mode, guided_blocks)  # its errors
    if noise_level is not None:
        if not isinstance(flow, ITarFlow):
            raise StarflowError("this flow knows no noise levels; leave the noise level out")
        flow = flow.at(noise_level)
    settings = METHODS[method]() if isinstance(method, str) and method in METHODS else method
    if not isinstance(settings, SequentialSettings | JacobiSettings):
        raise StarflowError(f"the PyTorch reference samples by {' or '.join(METHODS)}, not by {method!r}")
    with torch.inference_mode():
        tokens = flow.noise_tokens(z)
        batch, length, _ = tokens.shape
        conditions = flow.conditions(z, text, null_text, guidance)
        if guidance > 0 and guided_blocks is not None and guided_blocks < len(conditions.blocks):
            rest = len(conditions.blocks) - guided_blocks
            plain = flow.conditions(z, text, None, 0.0).blocks[:rest]
            conditions.blocks = [*plain, *conditions.blocks[rest:]]
        mode = guidance_mode or conditions.guidance_mode
        guidance_function(mode, guidance_target)  # its errors
        combine: Callable[..., tuple[Tensor, Tensor]] = starflow_guidance
        if mode != "starflow":
            combine = partial(tarflow_guidance if mode == "tarflow" else itarflow_guidance, target=guidance_target)
        total = sum(block.length(length) for block in flow.blocks if not block.is_identity)
        with watch(progress).counting("flow", total, "tok", label="sampling", leave=False) as counter:
            for index, (block, condition) in reversed(
                list(enumerate(zip(flow.blocks, conditions.blocks, strict=True)))
            ):
                evaluations = 0
                counter.block, counter.state = index, partial(flow.latents, tokens, z.shape)
                if not block.is_identity:
                    weight = Guidance(combine, guidance, annealed_guidance) if condition.guided else None
                    temperature: float | Tensor = attn_temp
                    if conditions.temper_null_only:
                        temperature = null_temperature(attn_temp, batch, z.device) if condition.guided else 1.0
                    decoder = BlockDecoder(
                        block, batch, block.length(length), conditions.rope_frequencies, condition, weight, temperature
                    )
                    tokens = invert_block(decoder, tokens, settings, counter.advance)
                    evaluations = decoder.evaluations
                if trace is not None:
                    trace.evaluations.append(evaluations)
                    if trace.keep_states:
                        trace.states.append(flow.latents(tokens, z.shape))
        check_finite(tokens, "the sample")
        x = flow.latents(tokens, z.shape)
    # Outside of inference mode, so that the result can take part in gradients.
    return x.clone()


def null_temperature(attn_temp: float, batch: int, device: torch.device) -> Tensor:
    """Attention temperatures of a guided batch, `[2B, 1, 1, 1]`: 1 with the condition, `attn_temp` without it."""
    return torch.tensor([1.0] * batch + [attn_temp] * batch, device=device).reshape(-1, 1, 1, 1)


def denoise(
    flow: STARFlow | PixelFlow,
    x: Tensor,
    text: Tensor | None = None,
    noise_std: float | None = None,
    *,
    progress: Watch = False,
) -> Tensor:
    """One score step (Tweedie's formula): x + noise_std^2 * d log p(x | text) / dx, one sample after another."""
    noise_std = flow.noise_std if noise_std is None else noise_std
    cleaned = []
    progress = watch(progress)
    for index in range(len(x)):
        progress.check()
        noisy = x[index : index + 1].detach().float().clone().requires_grad_()
        condition = None if text is None else text[index : index + 1].detach().clone()
        negative_log_likelihood = flow(noisy, condition).nll().sum() * noisy.numel()
        (score,) = torch.autograd.grad(negative_log_likelihood, noisy)
        cleaned.append(noisy.detach() - noise_std**2 * score)
    result = torch.cat(cleaned)
    check_finite(result, "the denoised sample")
    return result


def iterate(
    flow: ITarFlow,
    x: Tensor,
    labels: Tensor | None,
    levels: Sequence[float],
    clip: bool = False,
    *,
    noise: Tensor | None = None,
    progress: Watch = False,
    preview: Callable[[int, Tensor], None] = lambda step, clean: None,
) -> Tensor:
    """Denoise data step by step; see `mlx_starflow.sampling.iterate`."""
    progress = watch(progress)
    with progress.counting("denoising", len(levels), "step", leave=False) as counter:
        for step, (level, later) in enumerate(pairwise([*levels, 0.0])):
            clean = denoise(flow.at(level), x, labels, progress=progress)
            clean = clean.clamp(-1, 1) if clip else clean
            preview(step + 1, clean)
            counter.advance()
            if noise is None or not later:
                x = x - (level - later) * (x - clean) / level
            else:
                kept = (later / level) ** 2
                x = clean + later * (kept**0.5 * (x - clean) / level + (1 - kept) ** 0.5 * noise[step])
    return x


def check_finite(x: Tensor, what: str) -> None:
    """Raise StarflowError if a tensor holds a NaN or an infinity: better than a black picture."""
    if not x.isfinite().all():
        raise StarflowError(
            f"{what} is not finite: try a lower guidance or temperature, or weights in float32 (--dtype float32)"
        )
