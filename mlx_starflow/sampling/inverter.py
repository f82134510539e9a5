"""The tokens of a flow block while it is inverted, and the step from noise to data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx

from mlx_starflow import cpu
from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import AffineMap, affine_inverse, predict
from mlx_starflow.models.flow import FlowBlock
from mlx_starflow.sampling.guidance import Guidance
from mlx_starflow.sampling.network import CachedNetwork

Predict = Callable[[mx.array, "float | mx.array"], "tuple[mx.array, mx.array]"]
Couple = Callable[[mx.array, mx.array], mx.array]
Read = Callable[[mx.array, "mx.array | None", int, int], mx.array]
Invert = Callable[[mx.array, mx.array, "float | mx.array"], mx.array]


class Inverter(Protocol):
    """Noise z and data x of a block, `[B, N, C]`, and what makes one of the other; data begin as a copy of the noise.

    Tokens are predicted from the data before them; with guidance the network sees these twice, once with the null
    condition. It must remember exactly the inputs before those that a step needs, and remembers them too afterwards.
    """

    def data(self, start: int, stop: int) -> mx.array:
        """Tokens `start` to `stop` of x."""

    def write(self, start: int, tokens: mx.array) -> None:
        """Replace the tokens of x from number `start` on."""

    def remember(self, start: int, stop: int) -> None:
        """Let the network read what predicts tokens `start` to `stop`."""

    def predict(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """(mu, log sigma) `[B, stop - start, C]` of tokens `start` to `stop`."""

    def invert(self, start: int, stop: int, lag: int = 0) -> None:
        """Predict tokens `start` to `stop`, and map their noise to data. What stands before them is read `lag` tokens
        further back."""

    def sweep(self, start: int, stop: int, lag: int = 0) -> float:
        """`invert`; gives the mean square of the change over that of the new values."""


def make_inverter(
    network: CachedNetwork,
    z: mx.array,
    first_input: mx.array | None,
    affine: AffineMap,
    guidance: Guidance | None,
    weight: float | mx.array,
) -> Inverter:
    """An inverter of noise `[B, N, C]` by the fastest code that knows the network and the guidance.

    Args:
        network: for the batch of the noise, or with guidance for twice as much.
        z: the noise, in the block's order.
        first_input: what predicts the first token, `[B, 1, C]` for the network's batch; None if nothing does.
        affine: the block's affine map.
        guidance: None if the block has none.
        weight: of guidance for each token, a number or an array that broadcasts to `[B, N, 1]`.
    """
    fast = None
    if guidance is None:
        fast = cpu.fast_inverter(network, z, first_input, affine)
    elif isinstance(guidance.mode, str):
        fast = cpu.fast_inverter(network, z, first_input, affine, guidance.mode, weight, guidance.target)
    return fast or MLXInverter(network, z, first_input, affine, guidance, weight)


class MLXInverter:
    """An inverter in MLX, with any network."""

    def __init__(
        self,
        network: CachedNetwork,
        z: mx.array,
        first_input: mx.array | None,
        affine: AffineMap,
        guidance: Guidance | None,
        weight: float | mx.array,
        read: Read | None = None,
    ):
        """Arguments as for `make_inverter`; `read` is `FlowBlock.inputs` of a block that does not read in order."""
        self.network, self.z, self.x, self.first_input, self.weight = network, z, mx.array(z), first_input, weight
        self.copies, self.read = 1 if guidance is None else 2, read
        self.to_affine, self.to_data = affine_functions(affine, guidance)

    def data(self, start: int, stop: int) -> mx.array:
        return self.x[:, start:stop]

    def write(self, start: int, tokens: mx.array) -> None:
        self.x[:, start : start + tokens.shape[1]] = tokens

    def remember(self, start: int, stop: int) -> None:
        self.network.remember(self._inputs(start, stop))

    def predict(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        return self.to_affine(self.network(self._inputs(start, stop)), self._weight(start, stop))

    def invert(self, start: int, stop: int, lag: int = 0) -> None:
        parameters = self.network(self._inputs(start, stop, lag))
        self.x[:, start:stop] = self.to_data(parameters, self.z[:, start:stop], self._weight(start, stop))

    def sweep(self, start: int, stop: int, lag: int = 0) -> float:
        old = self.data(start, stop)
        self.invert(start, stop, lag)
        new = self.data(start, stop)
        change = mx.square(new - old).mean() / mx.square(new).mean()
        mx.eval(self.x, change)
        return float(change)

    def _inputs(self, start: int, stop: int, lag: int = 0) -> mx.array:
        if self.read is not None:
            return self.read(self.x, self.first_input, start, stop)
        inputs = self.x[:, max(start - 1, 0) - lag : stop - 1 - lag]
        if self.copies == 2:
            inputs = mx.concatenate([inputs, inputs])
        if start == 0 and self.first_input is not None:
            inputs = mx.concatenate([self.first_input, inputs], axis=1)
        return inputs

    def _weight(self, start: int, stop: int) -> float | mx.array:
        weight = self.weight
        return weight[:, start:stop] if isinstance(weight, mx.array) and weight.shape[1] > 1 else weight


class CouplingInverter(MLXInverter):
    """An inverter for a block whose coupling is not affine, and which nothing guides."""

    def __init__(self, network: CachedNetwork, z: mx.array, first_input: mx.array | None, block: FlowBlock):
        """`block` has the coupling; the other arguments are those of `make_inverter`."""
        self.network, self.z, self.x, self.first_input, self.weight = network, z, mx.array(z), first_input, 0.0
        self.copies, self.read = 1, None if block.reads_in_order else block.inputs
        self._to_noise, self._to_data = coupling_functions(block)

    def predict(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        raise StarflowError("a mixture coupling has no mu and sigma; sample without guidance, and do not tune it")

    def invert(self, start: int, stop: int, lag: int = 0) -> None:
        self.x[:, start:stop] = self._to_data(self.network(self._inputs(start, stop, lag)), self.z[:, start:stop])

    def correct(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """What `invert` would make of tokens `start` to `stop`, and |f(x) - z| of those that are there,
        each `[B, stop - start, C]`; none is replaced."""
        parameters, z = self.network(self._inputs(start, stop)), self.z[:, start:stop]
        return self._to_data(parameters, z), mx.abs(self._to_noise(parameters, self.data(start, stop)) - z)


def coupling_functions(block: FlowBlock) -> tuple[Couple, Couple]:
    """Compiled: (a block's parameters, data) -> noise, and (these, noise) -> data; see `affine_functions`."""
    return mx.compile(lambda parameters, x: block.to_noise(parameters, x)[0]), mx.compile(block.to_data)


def affine_functions(affine: AffineMap, guidance: Guidance | None) -> tuple[Predict, Invert]:
    """Compiled: (affine parameters, weight of guidance) -> (mu, log sigma), and (these, noise, weight) -> data.

    Not methods: Python's garbage collector cannot see that a compiled method belongs to its object, and would never
    free either.
    """

    def affine_of(parameters: mx.array, weight: float | mx.array) -> tuple[mx.array, mx.array]:
        if guidance is None:
            return predict(parameters, affine)
        return guidance.predict(parameters, affine, weight)

    def inverse(parameters: mx.array, z: mx.array, weight: float | mx.array) -> mx.array:
        if guidance is None:
            return affine_inverse(parameters, z, affine)
        return guidance.inverse(parameters, z, affine, weight)

    return mx.compile(affine_of), mx.compile(inverse)
