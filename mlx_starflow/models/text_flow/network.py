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
from mlx_starflow.models.flow import Condition, Conditions, FlowOutput, run_blocks
from mlx_starflow.models.rope import line_frequencies
from mlx_starflow.models.text_flow.block import TextBlock, TextBlockConfig
from mlx_starflow.models.text_flow.codebook import Codebook
from mlx_starflow.models.text_flow.mixture import HALF_LOG_2PI
from mlx_starflow.models.text_flow.reading import gap_orders

UNKNOWN = "\ufffd"
"""Stands for characters that are not in the alphabet, if it is in the alphabet itself."""

MOST_CHARACTERS = 4096
"""Of an alphabet."""

MOST_AHEAD = 64
"""Next tokens that are read in a gap."""


@dataclass
class TextFlowConfig:
    """Sizes of a text flow.

    `alphabet` holds its characters, each once; `length` is how many of them a text has at most, and `size` how many
    numbers stand for one of them. `patch_size` characters are a token. `layers_per_block` counts the layers of each
    block, data side first, and `components` the Gaussians of its mixture coupling, for each character of a token; 0 is
    an affine coupling. Where the first block has as many as there are characters, they are the codebook's own. The
    first block reads tokens also as the characters that they are, and in a gap those of the `ahead` next ones that are
    known; with 0 it reads their numbers alone, and does not see where a gap ends.
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
    ahead: int = 0

    noise_std = 0.0

    def __post_init__(self) -> None:
        names = ("length", "channels", "size", "patch_size", "head_dim", "expansion")
        FLOW.positive(**{name: getattr(self, name) for name in names})
        FLOW.require(0 <= self.ahead <= MOST_AHEAD, f"ahead must be in 0..{MOST_AHEAD}")
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
            ahead=0 if index else self.ahead,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TextFlowConfig:
        """Read a model directory's `config.json`; raises StarflowError if a key or a value is not usable."""
        return FLOW.read(cls, config)

    def to_dict(self) -> dict[str, Any]:
        return write_config(self)


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
        return self.reading([block.order for block in self.blocks], temperature)

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


def sanitize(weights: Mapping[str, Any]) -> dict[str, Any]:
    """There are no official tensors: names are those of `TextFlow`."""
    return dict(weights)
