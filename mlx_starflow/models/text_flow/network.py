"""TarFlowLM: an autoregressive normalizing flow over text (arXiv 2507.00425).

A codebook makes continuous numbers of characters; the flow is their prior. Its blocks read the text in alternating
directions. The first one, on the data side, maps each token by a mixture coupling, which can represent the choice
between characters; the others may do so too, or by an affine one. One mixture block with a component for each
character is an ordinary autoregressive model: its weights are the probabilities of the next character.

A block can read a text with a gap: the characters around the gap first, and then those that are to fill it. So a gap is
filled by inversion with given tokens, each read with all that is given before and after it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import GuidanceMode
from mlx_starflow.models.configs import FLOW, MOST_LAYERS, write_config
from mlx_starflow.models.denoiser import Denoiser
from mlx_starflow.models.flow import BlockConfig, Condition, Conditions, FlowBlock, FlowOutput, run_blocks
from mlx_starflow.models.rope import line_frequencies
from mlx_starflow.models.text_flow.codebook import Codebook
from mlx_starflow.models.text_flow.mixture import HALF_LOG_2PI, Mixture

UNKNOWN = "\ufffd"
"""Stands for characters that are not in the alphabet, if it is in the alphabet itself."""

OFFSET = 0.05
"""Share of what the network gives for means and log sigma that is added to them. A step of training changes each of its
outputs by about the learning rate times its width, which is much in components as narrow as these."""

MOST_CHARACTERS = 4096
"""Of an alphabet."""


@dataclass(frozen=True, kw_only=True)
class TextBlockConfig(BlockConfig):
    """One block of a text flow."""

    positions: int
    """Tokens of the longest text."""
    components: int = 0
    """Gaussians of the mixture coupling; 0: the coupling is affine."""
    tied: bool = False
    """The components are the codebook, to which the network adds; else the block has a mixture of its own for that."""
    groups: int = 1
    """Characters of a token, each with a mixture of its own."""

    @property
    def mixture(self) -> Mixture | None:
        if not self.components:
            return None
        return Mixture(self.components, self.groups, self.in_channels // self.groups)


@dataclass
class TextFlowConfig:
    """Sizes of a text flow.

    `alphabet` holds its characters, each once; `length` is how many of them a text has at most, and `size` how many
    numbers stand for one of them. `patch_size` characters are a token. `layers_per_block` counts the layers of each
    block, data side first, and `components` the Gaussians of its mixture coupling, for each character of a token; 0 is
    an affine coupling. Where the first block has as many as there are characters, they are the codebook's own.
    """

    alphabet: str
    length: int
    channels: int
    layers_per_block: list[int]
    components: list[int]
    size: int = 6
    patch_size: int = 1
    head_dim: int = 32
    expansion: int = 4

    noise_std = 0.0

    def __post_init__(self) -> None:
        names = ("length", "channels", "size", "patch_size", "head_dim", "expansion")
        FLOW.positive(**{name: getattr(self, name) for name in names})
        count = len(self.alphabet)
        FLOW.require(2 <= count <= MOST_CHARACTERS, f"alphabet must have 2 to {MOST_CHARACTERS} characters")
        FLOW.require(len(set(self.alphabet)) == count, "alphabet must have each character once")
        self.layers_per_block = FLOW.typed("layers_per_block", "list[int]", self.layers_per_block)
        FLOW.require(self.layers_per_block, "layers_per_block is empty; it takes one number per block")
        FLOW.positive(**{f"layers_per_block[{index}]": count for index, count in enumerate(self.layers_per_block)})
        FLOW.require(sum(self.layers_per_block) <= MOST_LAYERS, f"more than {MOST_LAYERS} layers")
        for name, divisor in (("length", "patch_size"), ("channels", "head_dim")):
            value, by = getattr(self, name), getattr(self, divisor)
            FLOW.require(value % by == 0, f"{name} {value} is no multiple of {divisor} {by}")
        FLOW.require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even: positions rotate pairs")
        blocks = len(self.layers_per_block)
        self.components = FLOW.typed("components", "list[int]", self.components)
        counts = self.components
        FLOW.require(
            len(counts) == blocks and max(counts) <= MOST_CHARACTERS,
            f"components must hold {blocks} numbers, one per block, of at most {MOST_CHARACTERS}",
        )

    @property
    def blocks(self) -> int:
        return len(self.layers_per_block)

    def block(self, index: int) -> TextBlockConfig:
        """The block at `index`, counted from the data side; every second one reads last to first."""
        heads = self.channels // self.head_dim
        return TextBlockConfig(
            in_channels=self.size * self.patch_size,
            channels=self.channels,
            num_layers=self.layers_per_block[index],
            head_dim=self.head_dim,
            num_heads=heads,
            num_kv_heads=heads,
            expansion=self.expansion,
            norm_type="rms_norm",
            use_final_norm=True,
            use_qk_norm=True,
            use_softplus=False,
            flip=index % 2 == 1,
            positions=self.length // self.patch_size,
            components=self.components[index],
            tied=index == 0 and self.components[0] == len(self.alphabet),
            groups=self.patch_size,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TextFlowConfig:
        """Read a model directory's `config.json`; raises StarflowError if a key or a value is not usable."""
        return FLOW.read(cls, config)

    def to_dict(self) -> dict[str, Any]:
        return write_config(self)


class TextBlock(FlowBlock):
    """A flow block over text: rotary positions of what it has read, learned ones of what it predicts."""

    config: TextBlockConfig
    _codebook: Codebook
    _order: mx.array | None
    _temperature: float

    def __init__(self, config: TextBlockConfig, codebook: Codebook):
        super().__init__(config)
        # Past the module, which would count the flow's codebook as this block's too.
        object.__setattr__(self, "_codebook", codebook)
        if (mixture := config.mixture) is not None:
            self.proj_out = nn.Linear(config.channels, mixture.outputs)
            self.proj_out.weight = mx.zeros_like(self.proj_out.weight)
            self.proj_out.bias = mx.zeros_like(self.proj_out.bias)
            if not config.tied:
                self.mixture = codebook_mixture(mixture, codebook)
        self.pos_embed = 0.01 * mx.random.normal((config.positions, config.channels))
        self.jump_embed = 0.3 * mx.random.normal((config.channels,))
        self._set(None, 1.0)

    def _set(self, order: mx.array | None, temperature: float) -> None:
        # Past the module, which would take an array for a weight.
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_temperature", temperature)

    def at(self, order: mx.array | None, temperature: float) -> TextBlock:
        """This block, with the same weights, reading tokens in another order and choosing at another temperature."""
        block = copy.copy(self)
        block._set(order, temperature)
        return block

    @property
    def is_affine(self) -> bool:
        return not self.config.components

    def order(self, length: int) -> mx.array:
        """Places in the text of the tokens that the block reads, first to last, `[length]`."""
        if self._order is not None:
            return self._order
        forward = mx.arange(length)
        return forward[::-1] if self.config.flip else forward

    def permute(self, x: mx.array, frames: int = 1) -> mx.array:
        return super().permute(x, frames) if self._order is None else x[:, self._order]

    def unpermute(self, x: mx.array, frames: int = 1) -> mx.array:
        return super().unpermute(x, frames) if self._order is None else x[:, mx.argsort(self._order)]

    def rope_frequencies(self, rope_frequencies: mx.array | None, length: int) -> mx.array | None:
        """Of what is read: of the start, number 0 of the flow's line, and of the places in the block's order.

        What the block reads before it goes back to fill a gap stands where the gap's neighbour does: what it predicts
        is near to that.
        """
        if rope_frequencies is None:
            return None
        order, step = self.order(length), -1 if self.config.flip else 1
        read, predicted = order[:-1], order[1:]
        read = mx.where((predicted - read) * step < 0, predicted - step, read)
        places = mx.concatenate([mx.zeros((1,), order.dtype), read + 1])
        return rope_frequencies[mx.minimum(places, self.config.positions)]

    def jumps(self, length: int) -> mx.array:
        """Whether what is predicted is another place than the next one after what is read, `[length]`."""
        order, step = self.order(length), -1 if self.config.flip else 1
        first = length - 1 if self.config.flip else 0
        return mx.concatenate([order[:1] != first, order[1:] - order[:-1] != step])

    def added(self, start: int, stop: int, offset: mx.array | None) -> mx.array:
        """Learned positions of what inputs `start` to `stop` predict, from the condition's `offset`."""
        assert offset is not None
        return offset[:, start:stop]

    def condition(self, text: mx.array | None, batch: int, length: int = 0) -> Condition:
        """The learned positions of what is predicted of a text of `length` tokens, and where the order jumps."""
        positions = self.pos_embed[self.order(length)]
        return Condition(offset=mx.where(self.jumps(length)[:, None], positions + self.jump_embed, positions)[None])

    def complete(self, outputs: mx.array) -> mx.array:
        """A mixture, the codebook's or the block's own, to whose parameters the network adds: to log-weights what it
        gives, to means and to log sigma a small part of that."""
        mixture = self.config.mixture
        if mixture is None:
            return outputs
        logits, rest = mx.split(outputs.astype(mx.float32), [mixture.groups * mixture.components], axis=-1)
        base = codebook_mixture(mixture, self._codebook) if self.config.tied else self.mixture
        return base + mx.concatenate([logits, OFFSET * rest], axis=-1)

    def to_noise(self, parameters: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
        mixture = self.config.mixture
        if mixture is None:
            return super().to_noise(parameters, x)
        return mixture.forward(self._tempered(mixture, parameters), x)

    def to_data(self, parameters: mx.array, z: mx.array) -> mx.array:
        mixture = self.config.mixture
        if mixture is None:
            return super().to_data(parameters, z)
        return mixture.inverse(self._tempered(mixture, parameters), z)

    def _tempered(self, mixture: Mixture, parameters: mx.array) -> mx.array:
        if self._temperature == 1.0:
            return parameters
        logits, rest = mx.split(parameters, [mixture.groups * mixture.components], axis=-1)
        return mx.concatenate([logits / self._temperature, rest], axis=-1)


class TextFlow(nn.Module):
    """The flow over text, as the prior of a codebook's numbers.

    Its data are what the codebook makes of texts, `[B, T, size]`, T at most `length`; it has no condition.

    Attributes:
        config: of the flow.
        codebook: between characters and numbers.
        blocks: data side first.
    """

    guidance_mode: GuidanceMode = "starflow"

    def __init__(self, config: TextFlowConfig):
        super().__init__()
        self.config = config
        self.codebook = Codebook(len(config.alphabet), config.size)
        self.blocks: Sequence[TextBlock] = [
            TextBlock(config.block(index), self.codebook) for index in range(config.blocks)
        ]

    # ---- text

    def characters(self, text: str) -> mx.array:
        """Numbers of a text's characters, int32 `[T]`.

        Raises:
            StarflowError: one is not in the alphabet, and the alphabet has none that stands for unknown ones.
        """
        places = {character: index for index, character in enumerate(self.config.alphabet)}
        unknown = places.get(UNKNOWN)
        numbers = [places.get(character, unknown) for character in text]
        if None in numbers:
            raise StarflowError(f"this model does not know the character {text[numbers.index(None)]!r}")
        return mx.array(numbers, mx.int32)

    def text(self, characters: mx.array) -> str:
        """The inverse of `characters`, for `[T]`."""
        return "".join(self.config.alphabet[number] for number in np.array(characters))

    def log_weight(self, characters: mx.array, noise: mx.array) -> mx.array:
        """log p(x|z) + log p(z) - log q(z|x) of texts `[B, T]`, `[B]` in nats.

        z is drawn from q by standard normal noise `[B, T, size]`. Its mean over the noise is the ELBO, a lower bound of
        log p(x); so is the logarithm of the mean of its exponentials, the importance-weighted bound, which is nearer.
        """
        return self.log_weights(characters, noise).sum(axis=-1)

    def log_weights(self, characters: mx.array, noise: mx.array) -> mx.array:
        """The parts of `log_weight` that are about each character, `[B, T]`.

        Of a flow that reads a gap last, see `filling`, those of the characters in it add up to the same for what fills
        the gap, given the other characters.
        """
        z = self.codebook.encode(characters, noise)
        decoded = mx.take_along_axis(self.codebook.log_decoder(z), characters[..., None].astype(mx.int32), axis=-1)
        return decoded[..., 0] - self.codebook.log_encoder(characters, noise) + self.log_priors(z)

    def log_priors(self, z: mx.array) -> mx.array:
        """log p(z) of data `[B, T, size]`, by character, `[B, T]`."""
        out = self(z)
        return (out.log_det - 0.5 * mx.square(out.z) - HALF_LOG_2PI).sum(axis=-1)

    # ---- other orders and temperatures

    def reading(self, orders: Sequence[mx.array | None], temperature: float = 1.0) -> TextFlow:
        """This flow, with the same weights, whose blocks read the tokens' places in these orders, see `gap_orders`.

        `temperature` divides the log-weights of the mixtures: below 1 likely characters become likelier.
        """
        if not 0 < temperature < math.inf:
            raise StarflowError(f"the temperature must be greater than 0, not {temperature:g}")
        flow = copy.copy(self)
        flow.blocks = [block.at(order, temperature) for block, order in zip(self.blocks, orders, strict=True)]
        return flow

    def at_temperature(self, temperature: float) -> TextFlow:
        """This flow, choosing at another temperature, see `reading`."""
        return self.reading([block._order for block in self.blocks], temperature)

    def filling(self, hidden: Sequence[bool]) -> TextFlow:
        """This flow, reading the characters that are not hidden before those that are.

        Raises:
            StarflowError: nothing is hidden, or only some characters of a token.
        """
        patch, length = self.config.patch_size, len(hidden)
        rows = [hidden[start : start + patch] for start in range(0, length, patch)]
        if not any(hidden):
            raise StarflowError("there is nothing to fill: no character is hidden")
        if length % patch or any(any(row) != all(row) for row in rows):
            raise StarflowError(f"gaps must begin and end at multiples of {patch} characters, the size of a token")
        forward, backward = gap_orders([row[0] for row in rows])
        return self.reading([backward if block.config.flip else forward for block in self.blocks])

    # ---- the protocol of flows

    @property
    def denoiser(self) -> Denoiser | None:
        """A text flow has none: its decoder makes characters of noisy numbers."""
        return None

    @property
    def noise_type(self) -> str:
        """The codebook's noise is part of the data."""
        return "gaussian"

    @property
    def noise_std(self) -> float:
        """0: nothing is added to the data."""
        return self.config.noise_std

    @property
    def prior_variance(self) -> mx.array:
        """1."""
        return mx.array(1.0)

    def tokens(self, x: mx.array) -> mx.array:
        """Data `[B, T, size]` -> tokens `[B, T / p, p * size]`. Raises StarflowError if the shape does not fit."""
        config = self.config
        good = x.ndim == 3 and x.shape[2] == config.size and 0 < x.shape[1] <= config.length
        if not good or x.shape[1] % config.patch_size:
            multiple = f", a multiple of {config.patch_size}" if config.patch_size > 1 else ""
            raise StarflowError(
                f"data have shape {tuple(x.shape)}; this flow reads [batch, characters, {config.size}], at most "
                f"{config.length} characters{multiple}"
            )
        return x.astype(mx.float32).reshape(x.shape[0], -1, config.size * config.patch_size)

    def latents(self, tokens: mx.array, shape: tuple[int, ...] | None = None) -> mx.array:
        """The inverse of `tokens`."""
        return tokens.reshape(tokens.shape[0], -1, self.config.size)

    def noise_tokens(self, z: mx.array) -> mx.array:
        """Noise, shaped as the data, -> tokens."""
        return self.tokens(z)

    def output_tokens(self, z: mx.array) -> mx.array:
        """`flow(x).z` -> tokens."""
        return self.tokens(z)

    def token_noise(self, tokens: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Tokens -> noise, shaped as the data."""
        return self.latents(tokens)

    def standardize(self, z: mx.array) -> mx.array:
        """The noise that `sample` takes: `flow(x).z` itself."""
        return z

    def rope_frequencies(self, shape: tuple[int, ...], text_length: int) -> mx.array:
        """Of the start token and of every place of the longest text."""
        return line_frequencies(self.config.head_dim, self.config.length // self.config.patch_size + 1)

    def block_rope_frequencies(self, shape: tuple[int, ...], text_length: int) -> list[mx.array | None]:
        """The same for all blocks, which choose from them, see `TextBlock.rope_frequencies`."""
        return [self.rope_frequencies(shape, text_length)] * len(self.blocks)

    def block_conditions(self, text: mx.array | None, batch: int, length: int | None = None) -> list[Condition]:
        """The positions of texts of `length` tokens; None: of the longest."""
        if text is not None:
            raise StarflowError("a text flow has no condition; leave it out")
        length = self.config.length // self.config.patch_size if length is None else length
        return [block.condition(None, batch, length) for block in self.blocks]

    def conditions(
        self, shape: tuple[int, ...], text: mx.array | None, null_text: mx.array | None = None, guidance: float = 0.0
    ) -> Conditions:
        """What sampling from noise of `shape` reads. Raises StarflowError if there is a condition, or guidance."""
        if guidance > 0 or null_text is not None:
            raise StarflowError("a text flow has no condition to guide by; use guidance 0")
        blocks = self.block_conditions(text, shape[0], shape[1] // self.config.patch_size)
        return Conditions(self.block_rope_frequencies(shape, 0), blocks, self.guidance_mode)

    def __call__(
        self,
        x: mx.array,
        text: mx.array | None = None,
        context_mask: mx.array | None = None,
        gradient_checkpointing: bool = False,
    ) -> FlowOutput:
        """Data `[B, T, size]` -> noise, shaped alike."""
        tokens = self.tokens(x)
        conditions = self.block_conditions(text, x.shape[0], tokens.shape[1])
        frequencies = self.block_rope_frequencies(x.shape, 0)
        hidden, log_dets = run_blocks(
            self.blocks, tokens, conditions, frequencies, context_mask, gradient_checkpointing
        )
        log_dets = [self.latents(each) for each in log_dets]
        shaped = [self.latents(each) for each in hidden]
        return FlowOutput(shaped[-1], sum(log_dets[1:], log_dets[0]), log_dets, shaped)


def codebook_mixture(mixture: Mixture, codebook: Codebook) -> mx.array:
    """Parameters of a mixture with equal weights whose components are a codebook, over and over if there are more."""
    places = mx.arange(mixture.components) % codebook.mean.shape[0]
    shape = (mixture.groups, mixture.components, mixture.size)
    mean, log_std = codebook.mean[places], codebook.log_stds[places][:, None]
    return mixture.outputs_of(mx.zeros(shape[:2]), mx.broadcast_to(mean, shape), mx.broadcast_to(log_std, shape))


def gap_orders(hidden: Sequence[bool]) -> tuple[mx.array, mx.array]:
    """Orders of the places 0 to N - 1 in which those that are hidden, `[N]`, come last.

    Returns:
        `[N]` twice, int32: each part first to last, and each part last to first.
    """
    given = [place for place, gap in enumerate(hidden) if not gap]
    gaps = [place for place, gap in enumerate(hidden) if gap]
    return mx.array(given + gaps, mx.int32), mx.array(given[::-1] + gaps[::-1], mx.int32)


def sanitize(weights: Mapping[str, Any]) -> dict[str, Any]:
    """There are no official tensors: names are those of `TextFlow`."""
    return dict(weights)
