"""STARFlow-V's learned denoiser (arXiv 2511.20462): a transformer that predicts the score of noisy latents.

It is not causal within a frame. In a video a frame sees the text, some frames before it and `look_ahead` frames after
it; and since every layer looks ahead again, the last layer's output for a frame depends on `num_layers * look_ahead`
frames after it. The text sees itself and what the first frame sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.configs import FLOW
from mlx_starflow.models.gradient_checkpointing import checkpointed
from mlx_starflow.models.transformer import RMSNorm, TransformerConfig, TransformerLayer


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(TransformerConfig):
    """The denoiser beside a flow."""

    in_channels: int
    """Numbers in a token."""
    txt_dim: int = 0
    """Width of the text embeddings; 0: it does not read text."""
    use_final_norm: bool = False
    look_ahead: int = 0
    """Frames after its own that a frame sees in each layer."""
    window: int | None = None
    """Of the frames up to `look_ahead` after its own, a frame sees the last `window` + 1; None: all."""

    def __post_init__(self) -> None:
        least = max(self.look_ahead, 1)
        FLOW.require(self.window is None or self.window >= least, f"denoiser_window must be {least} or more")

    def seen(self, frame: int, frames: int) -> tuple[int, int]:
        """The frames `[first, stop)` of a video of `frames` that frame number `frame` sees in a layer."""
        last = frame + self.look_ahead
        first = 0 if self.window is None else max(last - self.window, 0)
        return first, min(last + 1, frames)


class Denoiser(nn.Module):
    """Noisy tokens -> their predicted score; the clean latents are x - 0.3 * prediction (see `sampling.denoise`)."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.proj_in = nn.Linear(config.in_channels, config.channels)
        self.proj_out = nn.Linear(config.channels, config.in_channels)
        # Zero parameters: a new denoiser leaves everything as it is.
        self.proj_out.weight = mx.zeros_like(self.proj_out.weight)
        self.proj_out.bias = mx.zeros_like(self.proj_out.bias)
        if config.txt_dim:
            self.proj_txt = nn.Linear(config.txt_dim, config.channels)
        self.attn_blocks = [TransformerLayer(config) for _ in range(config.num_layers)]
        if config.use_final_norm:
            self.final_norm = RMSNorm(config.channels)

    @property
    def dtype(self) -> mx.Dtype:
        return self.proj_in.weight.dtype

    def embed_text(self, text: mx.array | None) -> mx.array | None:
        """Text embeddings `[B, L, D]` -> what stands before the tokens; None if the denoiser reads no text."""
        if not self.config.txt_dim:
            return None
        if text is None:
            raise StarflowError(f"this denoiser reads text: give embeddings [batch, length, {self.config.txt_dim}]")
        return self.proj_txt(text.astype(self.dtype))

    def embed(self, tokens: mx.array) -> mx.array:
        return self.proj_in(tokens.astype(self.dtype))

    def predict(self, h: mx.array) -> mx.array:
        """Hidden states of the last layer -> the prediction, float32."""
        if self.config.use_final_norm:
            h = self.final_norm(h)
        return self.proj_out(h).astype(mx.float32)

    def __call__(
        self,
        tokens: mx.array,
        text: mx.array | None,
        rope_frequencies: mx.array,
        frames: int = 1,
        gradient_checkpointing: bool = False,
    ) -> mx.array:
        """Predict the score of all frames at once.

        Args:
            tokens: `[B, frames * N, C]`, frame after frame.
            text: embeddings `[B, L, D]`.
            rope_frequencies: of the text's and the tokens' positions (of the text's only if the denoiser reads it).
            frames: 1 for a picture.
            gradient_checkpointing: a gradient computes each layer again instead of keeping what it computed.

        Returns:
            `[B, frames * N, C]`, float32.
        """
        h, prefix = self.embed(tokens), self.embed_text(text)
        start = 0
        if prefix is not None:
            start = prefix.shape[1]
            h = mx.concatenate([prefix, h], axis=1)
        rope_frequencies = rope_frequencies[rope_frequencies.shape[0] - h.shape[1] :]

        for layer in self.attn_blocks:
            run = _FrameLayer(layer, self.config, start, frames)
            h = (checkpointed(layer, run) if gradient_checkpointing else run)(h, rope_frequencies)
        return self.predict(h[:, start:])


class _FrameLayer:
    """One layer over text and all frames, attention frame by frame: each sees a slice, and nothing is masked."""

    def __init__(self, layer: TransformerLayer, config: DenoiserConfig, start: int, frames: int):
        self.layer, self.config, self.start, self.frames = layer, config, start, frames

    def __call__(self, h: mx.array, rope_frequencies: mx.array) -> mx.array:
        layer, start, frames = self.layer, self.start, self.frames
        q, k, v = layer.before(h, rope_frequencies)
        size = (h.shape[1] - start) // frames
        parts = []
        for frame in range(frames):
            first, stop = self.config.seen(frame, frames)
            # The text sees what the first frame sees.
            begin = start + frame * size if frame else 0
            queries = q[:, :, begin : start + (frame + 1) * size]
            keys, values = (_seen(a, start, size, first, stop) for a in (k, v))
            parts.append(layer.attention.attend(queries, keys, values, causal=False))
        return layer.after(h, mx.concatenate(parts, axis=1))


def _seen(a: mx.array, start: int, size: int, first: int, stop: int) -> mx.array:
    """Keys or values `[B, heads, positions, D]` of the text and of the frames `[first, stop)`."""
    if first == 0:
        return a[:, :, : start + stop * size]
    return mx.concatenate([a[:, :, :start], a[:, :, start + first * size : start + stop * size]], axis=2)
