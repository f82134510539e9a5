"""PyTorch twin of `mlx_starflow.sampling`: sequential and block-wise Jacobi inversion, guidance, score denoising."""

from __future__ import annotations

import torch
from torch import Tensor

from mlx_starflow.reference.starflow import FlowBlock, KVCache, STARFlow, axial_table


def guide(
    mu: Tensor, log_sigma: Tensor, mu_null: Tensor, log_sigma_null: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    ratio = torch.exp(2 * (log_sigma - log_sigma_null).clamp(max=0))
    denominator = 1 + weight - weight * ratio
    return ((1 + weight) * mu - weight * ratio * mu_null) / denominator, log_sigma - 0.5 * torch.log(denominator)


class BlockDecoder:
    """One block fed a few tokens at a time; with guidance the batch runs twice in one evaluation."""

    def __init__(
        self,
        block: FlowBlock,
        batch: int,
        length: int,
        table: Tensor,
        text: Tensor | None,
        guidance: float,
        temp: float,
    ):
        self.block, self.guidance, self.temperature = block, guidance, temp
        self.copies = 2 if guidance else 1
        self.first = 0 if block.config.sos else 1
        prefix = block.embed_prefix(text)
        positions = length + (0 if prefix is None else prefix.shape[1])
        self.table = block.positions(table, positions)
        self.caches = [KVCache(positions) for _ in block.attn_blocks]
        self.evaluations = 0
        if prefix is not None:
            self._transform(prefix)

    def _transform(self, h: Tensor) -> Tensor:
        start = self.caches[0].offset
        return self.block.transform(h, self.table[start : start + h.shape[1]], self.caches, self.temperature)

    def predict(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(mu, log sigma) of tokens `start` to `stop`, given the tokens before them."""
        self.evaluations += 1
        inputs = x[:, max(start - 1, 0) : stop - 1]
        if start == 0:
            inputs = torch.cat([self.block.sos_embed.expand(len(x), -1, -1).to(x.dtype), inputs], dim=1)
        inputs = torch.cat([inputs] * self.copies)
        mu, log_sigma = self.block.affine(self._transform(self.block.embed(inputs)))
        if self.copies == 2:
            (mu, mu_null), (log_sigma, log_sigma_null) = mu.chunk(2), log_sigma.chunk(2)
            mu, log_sigma = guide(mu, log_sigma, mu_null, log_sigma_null, self.guidance)
        return mu, log_sigma

    def trim(self, n: int) -> None:
        for cache in self.caches:
            cache.trim(n)


@torch.no_grad()
def sample(
    flow: STARFlow,
    z: Tensor,
    text: Tensor | None = None,
    null_text: Tensor | None = None,
    guidance: float = 0.0,
    method: str = "sequential",
    *,
    block_size: int = 16,
    threshold: float = 1e-3,
    max_iterations: int = 32,
    attn_temp: float = 1.0,
) -> Tensor:
    """Noise `[B, H, W, C]` -> data; the arguments are those of `mlx_starflow.sample`."""
    batch, height, width, _ = z.shape
    p = flow.config.patch_size
    table = axial_table(flow.config, height // p, width // p, 0 if text is None else text.shape[1]).to(z.device)
    guided = torch.cat([text, null_text.expand_as(text)]) if guidance else text
    x = flow.patchify(z.float())
    for block in reversed(flow.blocks):
        if block.is_identity:
            continue
        weight = guidance if block.config.txt_dim else 0.0
        decoder = BlockDecoder(block, batch, x.shape[1], table, guided if weight else text, weight, attn_temp)
        noise = x.flip(1) if block.config.flip else x
        size = 1 if method == "sequential" else block_size
        x = invert(decoder, noise, size, threshold, 1 if method == "sequential" else max_iterations)
        if block.config.flip:
            x = x.flip(1)
    return flow.unpatchify(x, height, width)


def invert(decoder: BlockDecoder, z: Tensor, block_size: int, threshold: float, max_iterations: int) -> Tensor:
    """Invert one block, both in the block's order; a `block_size` of 1 is sequential inversion."""
    x = z.clone()
    start = decoder.first
    if start:
        mu, log_sigma = decoder.block.unpredicted(z[:, :1])
        x[:, :1] = z[:, :1] * torch.exp(log_sigma) + mu
    while start < z.shape[1]:
        stop = min(start + block_size, z.shape[1])
        for sweep in range(max_iterations):
            if sweep:
                decoder.trim(stop - start)
            mu, log_sigma = decoder.predict(x, start, stop)
            new = z[:, start:stop] * torch.exp(log_sigma) + mu
            change = (new - x[:, start:stop]).square().mean() / new.square().mean()
            x[:, start:stop] = new
            if max_iterations > 1 and change < threshold:
                break
        start = stop
    return x


def denoise(flow: STARFlow, x: Tensor, text: Tensor | None = None, noise_std: float | None = None) -> Tensor:
    """One score step: x + noise_std^2 * d log p(x | text) / dx."""
    noise_std = flow.config.noise_std if noise_std is None else noise_std
    x = x.detach().requires_grad_()
    total = (flow(x, text).nll() * x[0].numel()).sum()
    return (x - noise_std**2 * torch.autograd.grad(total, x)[0]).detach()
