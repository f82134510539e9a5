"""The likelihood of the same data under several conditions, without computing again what no condition changes."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_starflow.kernels.affine import affine_forward
from mlx_starflow.likelihood.nll import HALF_LOG_2PI, check_nats, token_nats
from mlx_starflow.models.flow import Condition, Flow, frame_count, run_blocks
from mlx_starflow.models.starflow import STARFlow


@dataclass
class _TextCache:
    """Keys and values of the texts in one layer, `[prompts, heads, L, D]`, before those of the tokens."""

    keys: mx.array | None = None
    values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
            return keys, values
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)

    def of(self, prompts: mx.array) -> _TextCache:
        """The same for a batch, by the numbers of its prompts."""
        assert self.keys is not None and self.values is not None
        return _TextCache(self.keys[prompts], self.values[prompts])


class ConditionedFlow:
    """A flow whose data are measured under each of several conditions.

    Shallow blocks do not see the text: they run once for each datum. The text stands before the tokens and sees none
    of them: its keys and values are computed once for each condition. What is left is the deep block's pass over the
    tokens. Flows that this is not true of are measured condition by condition.

    Attributes:
        flow: the flow.
        conditions: `[prompts, ...]`, as the flow takes them.
        shape: of the data, `[B, ...]`, of any batch size.
    """

    def __init__(self, flow: Flow, conditions: mx.array, shape: tuple[int, ...]):
        self.flow, self.conditions, self.shape = flow, conditions, shape
        self._caches: list[_TextCache] = []
        self._deep = None
        if isinstance(flow, STARFlow):
            *shallow, deep = flow.blocks
            shares = deep.config.txt_dim and deep.config.sos and not any(block.config.txt_dim for block in shallow)
            self._deep = deep if shares and not deep.is_identity else None
        if self._deep is not None:
            length = conditions.shape[1]
            *self._shallow_frequencies, axial = flow.block_rope_frequencies(shape, length)
            prefix = self._deep.embed_prefix(conditions)
            assert prefix is not None  # of a block that reads text
            tokens = flow.tokens(mx.zeros((1, *shape[1:]))).shape[1]
            frequencies = self._deep.rope_frequencies(axial, length + tokens)
            self._frequencies = None if frequencies is None else frequencies[length:]
            self._caches = [_TextCache() for _ in self._deep.attn_blocks]
            self._deep.transform(prefix, None if frequencies is None else frequencies[:length], self._caches)
            mx.eval([(cache.keys, cache.values) for cache in self._caches])

    def nats(self, x: mx.array, batch_size: int) -> np.ndarray:
        """-log p(x | condition) in nats of noisy data `[B, ...]` under all conditions: float64 `[B, prompts]`.

        `batch_size`: pairs of a datum and a condition at once.
        """
        pairs = np.stack(np.divmod(np.arange(len(x) * len(self.conditions)), len(self.conditions)))
        parts = [pairs[:, start : start + batch_size] for start in range(0, pairs.shape[1], batch_size)]
        if self._deep is None:
            found = [token_nats(self.flow, x[mx.array(i)], self.conditions[mx.array(j)]) for i, j in parts]
            for nats in found:
                check_nats(nats)
            return np.concatenate(found).sum(axis=(1, 2)).reshape(len(x), -1)
        tokens, spent = self._shallow(x)
        deep = [self._deep_nats(tokens[mx.array(i)], mx.array(j)) for i, j in parts]
        return spent[:, None] + np.concatenate(deep).reshape(len(x), -1)

    def _shallow(self, x: mx.array) -> tuple[mx.array, np.ndarray]:
        """What the deep block reads, and the nats of the blocks before it."""
        shallow = self.flow.blocks[:-1]
        tokens = self.flow.tokens(x)
        frames, free = frame_count(x.shape), [Condition()] * len(shallow)
        hidden, log_dets = run_blocks(shallow, tokens, free, self._shallow_frequencies, frames=frames)
        return hidden[-1].astype(mx.float32), _checked(log_dets, 0)

    def _deep_nats(self, x: mx.array, prompts: mx.array) -> np.ndarray:
        """Nats of the deep block and of the prior, of tokens and the numbers of their prompts."""
        deep = self._deep
        assert deep is not None
        x = deep.permute(x, frame_count(self.shape))
        first = deep.first_input(len(x))
        assert first is not None  # of a block with a start token
        h = deep.embed(mx.concatenate([first.astype(x.dtype), x[:, :-1]], axis=1))
        h = deep.transform(h, self._frequencies, [cache.of(prompts) for cache in self._caches])
        z, log_det = affine_forward(deep.affine_parameters(h), x, deep.config.affine)
        prior = np.array((0.5 * mx.square(z) + HALF_LOG_2PI).sum(axis=-1)).astype(np.float64).sum(axis=1)
        return prior + _checked([log_det], len(self._shallow_frequencies))


def _checked(log_dets: list[mx.array], number: int) -> np.ndarray:
    """Nats of blocks from their log-dets `[B, N, C]`; the first is block `number`. Raises NotFinite as `check_nats`."""
    parts = [np.zeros((*log_dets[0].shape[:2],))] * (1 + number) if log_dets else []
    parts += [-np.array(log_det.sum(axis=-1)).astype(np.float64) for log_det in log_dets]
    if not parts:
        return np.zeros(1)
    nats = np.stack(parts, axis=1)
    check_nats(nats)
    return nats.sum(axis=(1, 2))
