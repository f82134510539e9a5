"""What every flow has: its protocol, one block of it, what conditions a block, and what a forward pass gives.

A block reads its tokens in its own order and maps each one by an affine function whose parameters a causal transformer
predicts from the tokens before it:

    z_n = (x_n - mu_n) / sigma_n          log|det dz/dx| = -sum log sigma_n
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import AffineMap, GuidanceMode, affine_forward, affine_inverse, predict
from mlx_starflow.models.configs import FLOW
from mlx_starflow.models.denoiser import Denoiser
from mlx_starflow.models.gradient_checkpointing import checkpointed
from mlx_starflow.models.rope import line_frequencies
from mlx_starflow.models.transformer import Cache, RMSNorm, TransformerConfig, TransformerLayer, product_dtype


@dataclass(frozen=True, kw_only=True)
class BlockConfig(TransformerConfig):
    """One flow block."""

    in_channels: int
    """Numbers in a token."""
    use_final_norm: bool = False
    txt_dim: int = 0
    """Width of the text embeddings that stand before the tokens; 0: this block does not read text."""
    use_proj_txt: bool = True
    flip: bool = False
    """The block reads its tokens last to first; those of a video last to first within each frame."""
    local: bool = False
    """The block reads each frame of a video by itself."""
    sos: bool = True
    """A learned start token predicts the first token; else the first token passes through unchanged."""
    use_softplus: bool = True
    soft_clip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        FLOW.positive(in_channels=self.in_channels)
        width, text = self.channels, self.txt_dim
        FLOW.require(isinstance(text, int) and text >= 0, f"txt_dim must be an integer of at least 0, not {text!r}")
        FLOW.require(
            not text or self.use_proj_txt or text == width,
            f"without use_proj_txt the width of the text, {text}, must be the block's, {width}",
        )
        FLOW.require(not (text and self.local), "a block that reads each frame by itself (local) cannot read text")
        FLOW.require(self.soft_clip >= 0, f"soft_clip must be at least 0, not {self.soft_clip!r}")

    @property
    def affine(self) -> AffineMap:
        """How the block's affine parameters become (mu, log sigma)."""
        return AffineMap(self.soft_clip, self.use_softplus)


@dataclass
class FlowOutput:
    """What a forward pass gives, all in data order.

    Attributes:
        z: noise, shaped as the model's noise is (latents: as x; TarFlow: `[B, N, C]`).
        log_det: per-dimension log|det dz/dx|, summed over blocks, shaped as x.
        block_log_dets: the same for each block.
        hidden: what each block read, then z, shaped as x.
        penalty: weight of the latent-norm penalty in the loss.
    """

    z: mx.array
    log_det: mx.array
    block_log_dets: list[mx.array]
    hidden: list[mx.array]
    penalty: float = 0.0

    def nll(self) -> mx.array:
        """Negative log-likelihood of each sample, `[B]`, in nats per dimension, without the constant log(2 pi) / 2."""
        batch = self.z.shape[0]
        return (0.5 * mx.square(self.z)).reshape(batch, -1).mean(1) - self.log_det.reshape(batch, -1).mean(1)

    def loss(self, mean_nll: mx.array | None = None) -> mx.array:
        """The training objective: mean NLL in nats per dimension, plus the latent-norm penalty where configured.

        `mean_nll`: the mean of `nll()`, if it is known already.
        """
        loss = self.nll().mean() if mean_nll is None else mean_nll
        if self.penalty:
            loss = loss + self.penalty * sum(mx.square(h).mean() for h in self.hidden[:-1])
        return loss


@dataclass
class Condition:
    """What a block reads in addition to its tokens.

    Attributes:
        prefix: positions that stand before the tokens, `[B, L, channels]`.
        offset: is added to every embedded token, `[B, 1, channels]`.
        guided: the arrays hold the batch twice, with the condition and then with the null condition.
    """

    prefix: mx.array | None = None
    offset: mx.array | None = None
    guided: bool = False


@dataclass
class Conditions:
    """What sampling from a flow reads in addition to the noise.

    Attributes:
        rope_frequencies: for each block, data side first, those of the text's and the tokens' positions; None for a
            block without rotary positions.
        blocks: each block's condition, data side first.
        guidance_mode: how guidance combines the predictions with the condition and with the null condition.
        temper_null_only: the attention temperature is meant for the null predictions of guidance alone.
    """

    rope_frequencies: Sequence[mx.array | None]
    blocks: list[Condition]
    guidance_mode: GuidanceMode
    temper_null_only: bool = False


class FlowConfiguration(Protocol):
    """What the configs of all flows have."""

    noise_std: float

    def to_dict(self) -> dict[str, Any]: ...


class Flow(Protocol):
    """What sampling, likelihood, editing and training ask of a flow; `STARFlow`, `TarFlow`, `ITarFlow` and
    `TextFlow` have it.

    Data are latents `[B, H, W, C]`, of a video `[B, T, H, W, C]`, or a TarFlow's pixels. `text` is its condition:
    embeddings `[B, L, D]`, or a TarFlow's integer labels `[B]`. Blocks are counted from the data side.
    """

    @property
    def config(self) -> FlowConfiguration: ...

    @property
    def blocks(self) -> Sequence[FlowBlock]: ...

    @property
    def denoiser(self) -> Denoiser | None:
        """The learned denoiser beside the flow; None: a score step through the flow cleans samples."""

    @property
    def noise_type(self) -> str:
        """What was added to the training's data: "gaussian" noise of `noise_std`, or noise that is "uniform" within
        each of a pixel's 256 levels."""

    @property
    def noise_std(self) -> float | mx.array:
        """Standard deviation of the Gaussian noise in the data that the flow reads, or one a sample, `[B]`."""

    @property
    def prior_variance(self) -> mx.array:
        """Variance of the prior of the tokens that the last block makes, float32: 1, or `[N, C]` if learned."""

    def tokens(self, x: mx.array) -> mx.array:
        """Data -> tokens `[B, N, C]` in raster order, float32. Raises StarflowError if the shape does not fit."""

    def latents(self, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
        """The inverse of `tokens`, for data of `shape`, whose batch size may be another one."""

    def noise_tokens(self, z: mx.array) -> mx.array:
        """Standard-normal noise, shaped as `sample` takes it, -> the tokens that the last block makes of data."""

    def output_tokens(self, z: mx.array) -> mx.array:
        """`flow(x).z` -> the same as tokens `[B, N, C]`."""

    def token_noise(self, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Standard-normal tokens -> noise, shaped as `sample` takes it for data of `shape`."""

    def standardize(self, z: mx.array) -> mx.array:
        """`flow(x).z` -> the noise that `sample` makes x of: the same, unless the prior's variance is learned."""

    def rope_frequencies(self, shape: tuple[int, ...], text_length: int) -> mx.array | None:
        """Rope frequencies of the text's and the tokens' positions for data of `shape`; None: the flow has none."""

    def block_rope_frequencies(self, shape: tuple[int, ...], text_length: int) -> Sequence[mx.array | None]:
        """Those that each block reads."""

    def block_conditions(self, text: mx.array | None, batch: int) -> Sequence[Condition]:
        """What each block makes of the condition of `batch` samples."""

    def conditions(
        self, shape: tuple[int, ...], text: mx.array | None, null_text: mx.array | None = None, guidance: float = 0.0
    ) -> Conditions:
        """What sampling from noise of `shape` reads; raises StarflowError if a condition does not fit."""

    def __call__(
        self,
        x: mx.array,
        text: mx.array | None = None,
        context_mask: mx.array | None = None,
        gradient_checkpointing: bool = False,
    ) -> FlowOutput:
        """Data -> noise."""


class FlowBlock(nn.Module):
    """One autoregressive affine flow over tokens `[B, N, C]`; with no layers it is the identity.

    `condition`, `embed`, `transform` and `affine_parameters` are its steps; samplers take them a few tokens at a time.
    """

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        if self.is_identity:
            return
        self.proj_in = nn.Linear(config.in_channels, config.channels)
        self.proj_out = nn.Linear(config.channels, 2 * config.in_channels)
        # Zero parameters: a new block is the identity, the best start for a flow.
        self.proj_out.weight = mx.zeros_like(self.proj_out.weight)
        self.proj_out.bias = mx.zeros_like(self.proj_out.bias)
        if config.sos:
            self.sos_embed = mx.random.normal((1, 1, config.in_channels))
        if config.txt_dim and config.use_proj_txt:
            self.proj_txt = nn.Linear(config.txt_dim, config.channels)
        if config.use_final_norm:
            self.final_norm = RMSNorm(config.channels)
        self.attn_blocks = [TransformerLayer(config) for _ in range(config.num_layers)]

    @property
    def is_identity(self) -> bool:
        return self.config.num_layers == 0

    @property
    def dtype(self) -> mx.Dtype:
        return self.proj_in.weight.dtype

    def permute(self, x: mx.array, frames: int = 1) -> mx.array:
        """Tokens `[B, frames * N, C]` in data order -> as this block reads them: the same in its own order, or, if it
        is local, `[B * frames, N, C]`. Of an iTARFlow's block with patches of its own, also other tokens."""
        if self.config.local and frames > 1:
            x, frames = x.reshape(x.shape[0] * frames, -1, x.shape[-1]), 1
        return _flip(x, frames) if self.config.flip else x

    def unpermute(self, x: mx.array, frames: int = 1) -> mx.array:
        """The inverse of `permute`."""
        if not (self.config.local and frames > 1):
            return _flip(x, frames) if self.config.flip else x
        x = _flip(x, 1) if self.config.flip else x
        return x.reshape(x.shape[0] // frames, -1, x.shape[-1])

    def sequences(self, batch: int, length: int, frames: int = 1) -> tuple[int, int]:
        """(how many sequences, tokens of each) `permute` makes of `batch` sequences of `length` tokens."""
        return (batch * frames, length // frames) if self.config.local else (batch, length)

    @property
    def layers(self) -> list[TransformerLayer]:
        """The transformer's layers, in their order."""
        return self.attn_blocks

    def rope_frequencies(self, axial: mx.array | None, length: int) -> mx.array | None:
        """Those of this block's sequence of `length`: the last of the flow's axial ones, or one-dimensional ones."""
        if self.config.hf_style_rope:
            return line_frequencies(self.config.head_dim, length)
        return None if axial is None else axial[axial.shape[0] - length :]

    def embed_prefix(self, text: mx.array | None) -> mx.array | None:
        """Text `[B, L, D]` -> what stands before the tokens, `[B, L, channels]`; None if the block reads no text."""
        if not self.config.txt_dim:
            return None
        if text is None:
            raise StarflowError(f"this flow reads text: give embeddings [batch, length, {self.config.txt_dim}]")
        if text.shape[-1] != self.config.txt_dim:
            raise StarflowError(f"text embeddings are {text.shape[-1]} wide; this flow reads {self.config.txt_dim}")
        text = text.astype(self.dtype)
        return self.proj_txt(text) if self.config.use_proj_txt else text

    def condition(self, text: mx.array | None, batch: int) -> Condition:
        """What this block makes of the condition that the flow is given for `batch` samples."""
        return Condition() if self.is_identity else Condition(prefix=self.embed_prefix(text))

    def first_input(self, batch: int) -> mx.array | None:
        """What predicts the first token, `[B, 1, C]`; None if nothing does and it passes unchanged."""
        if not self.config.sos:
            return None
        return mx.broadcast_to(self.sos_embed, (batch, 1, self.config.in_channels))

    @property
    def reads_in_order(self) -> bool:
        """Whether what predicts a token is the one that the block reads just before it."""
        return True

    @property
    def input_size(self) -> int:
        """Numbers of each of a block's `inputs`."""
        return self.config.in_channels

    @property
    def input_layer(self) -> nn.Linear:
        """The linear layer that reads what `inputs` gives."""
        return self.proj_in

    def inputs(self, x: mx.array, first: mx.array | None, start: int, stop: int) -> mx.array:
        """What predicts tokens `start` to `stop` of x `[B, N, C]`, in the block's order: the tokens before them.

        `first` is what `first_input` gives; if that is None, nothing predicts token 0, and it reads nothing.
        """
        before = x[:, max(start - 1, 0) : stop - 1]
        return before if start or first is None else mx.concatenate([first.astype(x.dtype), before], axis=1)

    def embed(self, tokens: mx.array, start: int = 0, offset: mx.array | None = None) -> mx.array:
        """Input tokens `[B, n, C]`, the first of them number `start` in the block's order, -> `[B, n, channels]`.

        `offset` is the condition's.
        """
        h = self.input_layer(tokens.astype(self.dtype))
        added = self.added(start, start + tokens.shape[1], offset)
        return h if added is None else h + added

    def added(self, start: int, stop: int, offset: mx.array | None) -> mx.array | None:
        """What `embed` adds to the projections of tokens `start` to `stop`, `[B or 1, n, channels]`; here nothing."""
        return None

    def transform(
        self,
        h: mx.array,
        rope_frequencies: mx.array | None,
        caches: Sequence[Cache] | None = None,
        temperature: float | mx.array = 1.0,
        gradient_checkpointing: bool = False,
    ) -> mx.array:
        """The transformer's layers over `[B, n, channels]`, whose positions have these rope frequencies, `[n, D/2]`.

        With `gradient_checkpointing` a gradient computes each layer again instead of keeping what it computed.
        """
        for index, layer in enumerate(self.layers):
            run = checkpointed(layer) if gradient_checkpointing else layer
            h = run(h, rope_frequencies, None if caches is None else caches[index], temperature)
        return h

    def affine_parameters(self, h: mx.array) -> mx.array:
        """Hidden states `[B, n, channels]` -> affine parameters `[B, n, 2 * C]`, which `kernels.affine` reads."""
        if self.config.use_final_norm:
            h = self.final_norm(h)
        return self.complete(self.proj_out(h))

    def complete(self, outputs: mx.array) -> mx.array:
        """Outputs of the last layer -> affine parameters; here they are the same."""
        return outputs

    @property
    def is_affine(self) -> bool:
        """Whether the coupling is affine, by (mu, log sigma); else only `to_noise` and `to_data` know what it is."""
        return True

    def to_noise(self, parameters: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
        """The coupling: tokens `[B, n, C]` and what the network predicts for them -> (z, per-dimension log-det)."""
        return affine_forward(parameters, x, self.config.affine)

    def to_data(self, parameters: mx.array, z: mx.array) -> mx.array:
        """The inverse of `to_noise`, for noise `[B, n, C]`."""
        return affine_inverse(parameters, z, self.config.affine)

    def unpredicted(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """(mu, log sigma) of tokens that nothing predicts: those of affine parameters 0."""
        return predict(mx.zeros((*tokens.shape[:-1], 2 * tokens.shape[-1])), self.config.affine)

    def all_affine_parameters(
        self,
        x: mx.array,
        condition: Condition,
        rope_frequencies: mx.array | None,
        context_mask: mx.array | None = None,
        temperature: float | mx.array = 1.0,
        gradient_checkpointing: bool = False,
    ) -> mx.array:
        """Affine parameters `[B, N, 2 * C]` of all tokens x `[B, N, C]`, each predicted from the tokens before it.

        All in the block's order; a token that nothing predicts gets zeros. `context_mask` is explained in `__call__`,
        `gradient_checkpointing` in `transform`.
        """
        batch, length, _ = x.shape
        first = self.first_input(batch)
        inputs = x if first is None else self.inputs(x, first, 0, length)
        if context_mask is not None:
            inputs = inputs * context_mask[..., None]
        h = self.embed(inputs, 0, condition.offset)
        if condition.prefix is not None:
            h = mx.concatenate([condition.prefix, h], axis=1)
        own = self.rope_frequencies(rope_frequencies, h.shape[1])
        h = self.transform(h, own, temperature=temperature, gradient_checkpointing=gradient_checkpointing)[:, -length:]
        if first is not None:
            return self.affine_parameters(h)
        predicted = self.affine_parameters(h[:, :-1])
        unpredicted = mx.zeros((batch, 1, predicted.shape[-1]), predicted.dtype)
        return mx.concatenate([unpredicted, predicted], axis=1)

    def __call__(
        self,
        x: mx.array,
        condition: Condition,
        rope_frequencies: mx.array | None,
        context_mask: mx.array | None = None,
        gradient_checkpointing: bool = False,
        frames: int = 1,
    ) -> tuple[mx.array, mx.array]:
        """Tokens `[B, N, C]` in data order -> (z, per-dimension log-det), float32, both in data order.

        `condition` is what the block's own `condition` makes.
        `context_mask` `[B, N]`, in the block's order, hides an input from the network where it is 0: a training aid.
        `gradient_checkpointing`: see `transform`. `frames`: of a video, N / `frames` tokens each.
        """
        x = x.astype(mx.float32)
        if self.is_identity:
            return x, mx.zeros_like(x)
        x = self.permute(x, frames)
        parameters = self.all_affine_parameters(
            x, condition, rope_frequencies, context_mask, gradient_checkpointing=gradient_checkpointing
        )
        z, log_det = self.to_noise(parameters, x)
        return self.unpermute(z, frames), self.unpermute(log_det, frames)


def is_layer_weight(name: str) -> bool:
    """Whether a tensor of a flow, a block or a denoiser, by its name, is that of a linear layer in a transformer layer.

    These are nearly all of the weights. In half precision they alone are half: everything around them, the residual
    stream, norms, projections of tokens and affine parameters, costs next to nothing in float32.
    """
    layer = "attn_blocks." in name or name.startswith("shared_backbone.")
    return layer and not name.rpartition(".")[0].endswith("norm")


def active_blocks(flow: Flow) -> list[int]:
    """Numbers of the blocks that do something, in the order of sampling."""
    return [index for index in reversed(range(len(flow.blocks))) if not flow.blocks[index].is_identity]


def products_in(flow: Flow) -> mx.Dtype:
    """The dtype that a flow's transformer layers multiply in: what is meant by its precision."""
    blocks = [block for block in flow.blocks if not block.is_identity]
    return block_products_in(blocks[0]) if blocks else mx.float32


def block_products_in(block: FlowBlock) -> mx.Dtype:
    """The dtype that one block's transformer layers multiply in."""
    return (block.layers and product_dtype(block.layers[0].attention.qkv)) or mx.float32


def frame_count(shape: tuple[int, ...]) -> int:
    """Frames of data or noise of `shape`: of a video `[B, T, H, W, C]` T, of anything else one."""
    return shape[1] if len(shape) == 5 else 1


def _flip(x: mx.array, frames: int) -> mx.array:
    """Each of `frames` equal parts of the sequence `[B, N, C]` last to first."""
    if frames == 1:
        return x[:, ::-1]
    return x.reshape(x.shape[0], frames, -1, x.shape[-1])[:, :, ::-1].reshape(x.shape)


def run_blocks(
    blocks: Sequence[FlowBlock],
    tokens: mx.array,
    conditions: Sequence[Condition],
    rope_frequencies: Sequence[mx.array | None],
    context_mask: mx.array | None = None,
    gradient_checkpointing: bool = False,
    frames: int = 1,
) -> tuple[list[mx.array], list[mx.array]]:
    """Data -> noise: what each block read and then the noise, and each block's log-det; tokens in data order."""
    hidden, log_dets = [tokens], []
    for index, (block, condition, frequencies) in enumerate(zip(blocks, conditions, rope_frequencies, strict=True)):
        mask = context_mask if index == len(blocks) - 1 else None
        h, log_det = block(hidden[-1], condition, frequencies, mask, gradient_checkpointing, frames)
        hidden.append(h)
        log_dets.append(log_det)
    return hidden, log_dets
