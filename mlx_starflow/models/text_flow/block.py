"""One block of a text flow: what it reads to predict a token, and the mixtures that it maps tokens by."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.models.flow import BlockConfig, Condition, FlowBlock
from mlx_starflow.models.text_flow.codebook import Codebook
from mlx_starflow.models.text_flow.mixture import Mixture
from mlx_starflow.models.text_flow.reading import UNKNOWN, Reading

OFFSET = 0.05
"""Share of what the network gives for means and log sigma that is added to them. A step of training changes each of its
outputs by about the learning rate times its width, which is much in components as narrow as these."""

DISTANCES = 32
"""To the end of a gap that a block tells apart; longer ones are as this."""

CODE = 12
"""Numbers that the first block makes of each of the next tokens."""


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
    ahead: int = 0
    """So many of the next tokens are read in a gap, as far as they are known, and all tokens as characters too."""

    @property
    def mixture(self) -> Mixture | None:
        if not self.components:
            return None
        return Mixture(self.components, self.groups, self.in_channels // self.groups)


class TextBlock(FlowBlock):
    """A flow block over text: rotary positions of what it has read, learned ones of what it predicts.

    `jump_embed` is of tokens whose neighbours are not known yet, where the order jumps over a gap.
    """

    config: TextBlockConfig
    _codebook: Codebook
    _reading: Reading | None
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
        if config.ahead:
            characters = config.groups * codebook.mean.shape[0]
            embedding = 0.3 * mx.random.normal((config.channels, characters))
            self.proj_in.weight = mx.concatenate([self.proj_in.weight, embedding], axis=1)
            self.code_weight = mx.random.normal((CODE, config.in_channels + characters)) * config.in_channels**-0.5
            self.ahead_weight = 0.1 * mx.random.normal((config.channels, config.ahead * (CODE + 1)))
            self.distance_embed = 0.3 * mx.random.normal((DISTANCES, config.channels))
        self._set(None, 1.0)

    def _set(self, reading: Reading | None, temperature: float) -> None:
        # Past the module, which would take an array for a weight.
        object.__setattr__(self, "_reading", reading)
        object.__setattr__(self, "_temperature", temperature)

    def at(self, order: mx.array | None, temperature: float) -> TextBlock:
        """This block, with the same weights, reading tokens in another order and choosing at another temperature."""
        block = copy.copy(self)
        block._set(None if order is None else Reading(order, self.config.flip, self.config.ahead), temperature)
        return block

    @property
    def order(self) -> mx.array | None:
        """Places of the tokens as the block was told to read them, `[N]`; None: one after another."""
        return None if self._reading is None else self._reading.order

    @property
    def is_affine(self) -> bool:
        return not self.config.components

    @property
    def reads_in_order(self) -> bool:
        return self._reading is None and not self.config.ahead

    @property
    def input_size(self) -> int:
        return int(self.input_layer.weight.shape[1])

    @property
    def input_layer(self) -> nn.Linear:
        """In another order than the text's own the inputs are wider, by codes of the next tokens."""
        if self._reading is None or not self.config.ahead:
            return super().input_layer
        layer = copy.copy(self.proj_in)
        layer.weight = mx.concatenate([layer.weight, self.ahead_weight], axis=1)
        return layer

    def inputs(self, x: mx.array, first: mx.array | None, start: int, stop: int) -> mx.array:
        assert first is not None
        if self._reading is None:
            return self._read(super().inputs(x, first, start, stop))
        table, numbers = self._reading.rows(x, first, start, stop)
        read = self._read(table)
        own = read[:, numbers[:, 0]]
        if not self.config.ahead:
            return own
        known = (self._reading.ahead[start:stop] >= 0)[..., None]
        codes = mx.where(known, (read @ self.code_weight.T)[:, numbers[:, 1:]], 0)
        codes = mx.concatenate([codes, mx.broadcast_to(known, (*codes.shape[:3], 1)).astype(codes.dtype)], axis=-1)
        return mx.concatenate([own, codes.reshape(*own.shape[:2], -1)], axis=-1)

    def _read(self, tokens: mx.array) -> mx.array:
        """Tokens `[B, n, C]` and, if the block reads ahead, beside them how likely each character is."""
        if not self.config.ahead:
            return tokens
        batch, length, _ = tokens.shape
        numbers = tokens.reshape(batch, length * self.config.groups, -1)
        # Nearly always one of them is certain: what a gradient could change is not worth computing.
        likely = mx.stop_gradient(mx.exp(self._codebook.log_decoder(numbers.astype(mx.float32))))
        return mx.concatenate([tokens, likely.reshape(batch, length, -1).astype(tokens.dtype)], axis=-1)

    def permute(self, x: mx.array, frames: int = 1) -> mx.array:
        return super().permute(x, frames) if self._reading is None else x[:, self._reading.order]

    def unpermute(self, x: mx.array, frames: int = 1) -> mx.array:
        return super().unpermute(x, frames) if self._reading is None else x[:, mx.argsort(self._reading.order)]

    def rope_frequencies(self, rope_frequencies: mx.array | None, length: int) -> mx.array | None:
        """Of what is read: of the start, number 0 of the flow's line, and of the places of each token's neighbour."""
        if rope_frequencies is None:
            return None
        if self._reading is not None:
            places = self._reading.places
        elif self.config.flip:
            places = mx.concatenate([mx.zeros((1,), mx.int32), mx.arange(length, 1, -1)])
        else:
            places = mx.arange(length)
        return rope_frequencies[mx.minimum(places, self.config.positions)]

    def added(self, start: int, stop: int, offset: mx.array | None) -> mx.array:
        """Learned positions of what inputs `start` to `stop` predict, from the condition's `offset`."""
        assert offset is not None
        return offset[:, start:stop]

    def condition(self, text: mx.array | None, batch: int, length: int = 0) -> Condition:
        """The learned positions of what is predicted of a text of `length` tokens, and where it stands in a gap."""
        reading = self._reading
        if reading is None:
            places = mx.arange(length)
            return Condition(offset=self.pos_embed[places[::-1] if self.config.flip else places][None])
        offset = self.pos_embed[reading.order]
        offset = mx.where((reading.neighbours == UNKNOWN)[:, None], offset + self.jump_embed, offset)
        if self.config.ahead:
            embedded = self.distance_embed[mx.clip(reading.distance, 1, DISTANCES) - 1]
            offset = mx.where((reading.distance > 0)[:, None], offset + embedded, offset)
        return Condition(offset=offset[None])

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


def codebook_mixture(mixture: Mixture, codebook: Codebook) -> mx.array:
    """Parameters of a mixture with equal weights whose components are a codebook, over and over if there are more."""
    places = mx.arange(mixture.components) % codebook.mean.shape[0]
    shape = (mixture.groups, mixture.components, mixture.size)
    mean, log_std = codebook.mean[places], codebook.log_stds[places][:, None]
    return mixture.outputs_of(mx.zeros(shape[:2]), mx.broadcast_to(mean, shape), mx.broadcast_to(log_std, shape))
