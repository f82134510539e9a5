"""PyTorch twin of `models/starflow.py`: the same config, the same tensor names, arrays channels last.

It trains where PyTorch is the faster tool, and is what the MLX network is compared with; `sampling.py` inverts it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mlx_starflow.models.flow import BlockConfig
    from mlx_starflow.models.starflow import FlowConfig

SOFTPLUS_SHIFT = math.log(math.e - 1)


class RMSNorm(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], (1 + self.weight).to(x.dtype), 1e-6)


def make_norm(config: BlockConfig, dims: int) -> nn.Module:
    return RMSNorm(dims) if config.norm_type == "rms_norm" else nn.LayerNorm(dims, eps=1e-5)


def axial_table(config: FlowConfig, height: int, width: int, text_length: int) -> Tensor:
    """Rotary angles as unit complex numbers, `[text + height * width, head_dim / 2]`, text first."""
    pairs = config.head_dim // 2
    third = 8 if config.txt_size > 0 else 0
    axis = (pairs - third) // 2
    dims = pairs - third
    rates = 10000.0 ** (-2.0 * torch.arange(axis) / dims)
    scale = config.pt_seq_len / math.sqrt(height * width)
    rows, columns = torch.meshgrid(torch.arange(height) * scale, torch.arange(width) * scale, indexing="ij")
    rows, columns = rows.reshape(-1, 1), columns.reshape(-1, 1)
    image = torch.cat([rows * rates, columns * rates, torch.zeros(height * width, third)], dim=1)
    text = torch.zeros(text_length, pairs)
    if text_length and third:
        position = torch.arange(text_length)[:, None] / text_length * config.pt_seq_len
        text[:, 2 * axis :] = position * 10000.0 ** (-torch.arange(third) / third)
    angles = torch.cat([text, image])
    return torch.polar(torch.ones_like(angles), angles)


def line_table(dims: int, length: int) -> Tensor:
    """One-dimensional rotary angles, `[length, dims / 2]`."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dims, 2) / dims)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, table: Tensor, half_split: bool) -> Tensor:
    """Turn the rotary pairs of `[B, heads, N, D]` by the angles `[N, D / 2]`; float32."""
    if half_split:
        a, b = x.chunk(2, dim=-1)
        turned = torch.complex(a.float(), b.float()) * table
        return torch.cat([turned.real, turned.imag], dim=-1)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2)


class KVCache:
    """Keys (already rotated) and values of one layer, for exactly as many positions as the sequence has."""

    def __init__(self, length: int):
        self.length, self.offset = length, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update_and_fetch(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    def trim(self, n: int) -> None:
        self.offset -= min(n, self.offset)


class Attention(nn.Module):
    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        inner, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.norm = make_norm(config, config.channels)
        self.qkv = nn.Linear(config.channels, inner + 2 * keys, bias=config.use_bias)
        self.proj = nn.Linear(inner, config.channels, bias=config.use_bias)
        if config.use_qk_norm:
            self.query_norm = RMSNorm(config.head_dim)
            self.key_norm = RMSNorm(config.head_dim)
        if config.use_post_norm:
            self.post_norm = make_norm(config, config.channels)

    def forward(self, x: Tensor, table: Tensor, cache: KVCache | None = None, temperature: float = 1.0) -> Tensor:
        config = self.config
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        heads, groups = config.num_heads, config.num_kv_heads
        q, k, v = qkv.split([heads, groups, groups], dim=1)
        if config.use_qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, table, config.hf_style_rope), rotate(k, table, config.hf_style_rope)
        v = v.float()
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        scale = config.head_dim**-0.5 / temperature
        new, old = q.shape[2], k.shape[2] - q.shape[2]
        # PyTorch aligns its causal mask with the first key; with a cache it has to end at the last one.
        mask = torch.ones(new, old + new, dtype=torch.bool, device=x.device).tril(old) if new > 1 and old else None
        # On a CPU attention's backward pass is more than twice as fast in float32 as in bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            h = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=new > 1 and not old, scale=scale, enable_gqa=heads != groups
            )
        h = self.proj(h.transpose(1, 2).flatten(2).to(x.dtype))
        return self.post_norm(h) if config.use_post_norm else h


class MLP(nn.Module):
    def __init__(self, config: BlockConfig):
        super().__init__()
        hidden = config.channels * config.expansion
        self.norm = make_norm(config, config.channels)
        self.gated = config.use_swiglu
        if self.gated:
            self.gate_proj = nn.Linear(config.channels, hidden, bias=config.use_bias)
            self.up_proj = nn.Linear(config.channels, hidden, bias=config.use_bias)
            self.down_proj = nn.Linear(hidden, config.channels, bias=config.use_bias)
        else:
            self.main = nn.Sequential(
                nn.Linear(config.channels, hidden, bias=config.use_bias),
                nn.GELU(),
                nn.Linear(hidden, config.channels, bias=config.use_bias),
            )
        if config.use_post_norm:
            self.post_norm = make_norm(config, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.gated:
            h = self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))
        else:
            h = self.main(h)
        return self.post_norm(h) if hasattr(self, "post_norm") else h


class TransformerLayer(nn.Module):
    def __init__(self, config: BlockConfig):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, table: Tensor, cache: KVCache | None = None, temperature: float = 1.0) -> Tensor:
        x = x + self.attention(x, table, cache, temperature)
        return x + self.mlp(x)


class FlowBlock(nn.Module):
    """One autoregressive affine flow; see `models/starflow.py` for the mathematics."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        if config.num_layers == 0:
            return
        self.proj_in = nn.Linear(config.in_channels, config.channels)
        self.proj_out = nn.Linear(config.channels, 2 * config.in_channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        if config.sos:
            self.sos_embed = nn.Parameter(torch.randn(1, 1, config.in_channels))
        if config.txt_dim and config.use_proj_txt:
            self.proj_txt = nn.Linear(config.txt_dim, config.channels)
        if config.use_final_norm:
            self.final_norm = RMSNorm(config.channels)
        self.attn_blocks = nn.ModuleList([TransformerLayer(config) for _ in range(config.num_layers)])

    @property
    def is_identity(self) -> bool:
        return self.config.num_layers == 0

    def positions(self, table: Tensor, length: int) -> Tensor:
        if self.config.hf_style_rope:
            return line_table(self.config.head_dim, length).to(table.device)
        return table[len(table) - length :]

    def embed(self, tokens: Tensor) -> Tensor:
        return self.proj_in(tokens.to(self.proj_in.weight.dtype))

    def embed_prefix(self, text: Tensor | None) -> Tensor | None:
        if not self.config.txt_dim:
            return None
        text = text.to(self.proj_in.weight.dtype)
        return self.proj_txt(text) if self.config.use_proj_txt else text

    def transform(
        self, h: Tensor, table: Tensor, caches: list[KVCache] | None = None, temperature: float = 1.0
    ) -> Tensor:
        for index, layer in enumerate(self.attn_blocks):
            h = layer(h, table, caches[index] if caches else None, temperature)
        return h

    def affine(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states -> (mu, log sigma), float32."""
        if self.config.use_final_norm:
            h = self.final_norm(h)
        return self._affine(self.proj_out(h).float())

    def unpredicted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine(tokens.new_zeros(*tokens.shape[:-1], 2 * tokens.shape[-1]))

    def _affine(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.soft_clip:
            raw = self.config.soft_clip * torch.tanh(raw / self.config.soft_clip)
        scale, mu = raw.chunk(2, dim=-1)
        return mu, F.softplus(scale + SOFTPLUS_SHIFT).log() if self.config.use_softplus else scale

    def forward(
        self, x: Tensor, text: Tensor | None, table: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens `[B, N, C]` in data order -> (z, log-det), both in data order.

        `keep` `[B, N]`, in the block's order, hides a token's input from the network where it is 0 (a training aid).
        """
        config = self.config
        if self.is_identity:
            return x, torch.zeros_like(x)
        if config.flip:
            x = x.flip(1)
        inputs = x
        if config.sos:
            inputs = torch.cat([self.sos_embed.expand(len(x), -1, -1).to(x.dtype), x[:, :-1]], dim=1)
        if keep is not None:
            inputs = inputs * keep[..., None]
        h = self.embed(inputs)
        prefix = self.embed_prefix(text)
        if prefix is not None:
            h = torch.cat([prefix.to(h.dtype), h], dim=1)
        h = self.transform(h, self.positions(table, h.shape[1]))[:, -x.shape[1] :]
        if config.sos:
            mu, log_sigma = self.affine(h)
        else:
            first, rest = self.unpredicted(x[:, :1]), self.affine(h[:, :-1])
            mu, log_sigma = (torch.cat(pair, dim=1) for pair in zip(first, rest, strict=True))
        z = (x - mu) * torch.exp(-log_sigma)
        if config.flip:
            z, log_sigma = z.flip(1), log_sigma.flip(1)
        return z, -log_sigma


@dataclass
class FlowOutput:
    """z and per-dimension log-det, both shaped as x; `hidden` holds the tokens before each block and after the last."""

    z: Tensor
    log_det: Tensor
    hidden: list[Tensor]

    def nll(self) -> Tensor:
        """Nats per dimension without the constant 0.5 log(2 pi), `[B]`."""
        return (0.5 * self.z**2 - self.log_det).flatten(1).mean(dim=1)


class STARFlow(nn.Module):
    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([FlowBlock(block) for block in config.blocks])

    def patchify(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        p = self.config.patch_size
        x = x.reshape(batch, height // p, p, width // p, p, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        p = self.config.patch_size
        x = tokens.reshape(len(tokens), height // p, width // p, p, p, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(len(tokens), height, width, -1)

    def forward(self, x: Tensor, text: Tensor | None = None, keep: Tensor | None = None) -> FlowOutput:
        """Latents `[B, H, W, C]` (and text `[B, L, D]`) -> noise; `keep` goes to the deep block."""
        _, height, width, _ = x.shape
        p = self.config.patch_size
        length = 0 if text is None else text.shape[1]
        table = axial_table(self.config, height // p, width // p, length)
        h = self.patchify(x)
        log_det = torch.zeros_like(h)
        hidden = [h]
        for index, block in enumerate(self.blocks):
            h, part = block(h, text, table, keep if index == len(self.blocks) - 1 else None)
            log_det = log_det + part
            hidden.append(h)
        return FlowOutput(self.unpatchify(h, height, width), self.unpatchify(log_det, height, width), hidden)
