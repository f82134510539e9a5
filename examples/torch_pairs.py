"""Pairs of a model's samples made in PyTorch: what `mlx-starflow distill` makes first, in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from mlx_starflow.reference.loading import load_flow
from mlx_starflow.reference.sampling import sample
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.sampling import SamplingTrace
from mlx_starflow.sampling.progress import Progress
from mlx_starflow.training.data.pairs.compute import Pairs
from mlx_starflow.training.recipes.teacher_pairs import TeacherPairs


@dataclass
class TorchPairs(TeacherPairs):
    """The pairs of a STARFlow's samples, of the same noise and prompts, so that either goes on with the other's."""

    device: str = field(default="cpu", kw_only=True)
    at_once: ClassVar[int] = 128

    @cached_property
    def flow(self) -> STARFlow:
        flow = load_flow(self.model, self.device, "bfloat16")
        assert isinstance(flow, STARFlow)
        return flow

    def sample_pairs(self, z: np.ndarray, prompts: list[str], progress: Progress) -> Pairs:
        flow, guidance = self.flow, self.settings.guidance
        noise, text, null = (
            torch.from_numpy(array).to(self.device) for array in (z, self._text(prompts), self._text([""]))
        )
        trace = SamplingTrace(keep_states=True)
        with torch.no_grad():
            x = sample(flow, noise, text, null, guidance, progress=progress, trace=trace)
        noisy = x.detach().requires_grad_()
        # The samples know nothing of each other, so the gradient of the sum is that of each one's likelihood.
        (gradient,) = torch.autograd.grad(flow(noisy, text).nll().sum() * noisy[0].numel(), noisy)

        def tokens(latents: Tensor) -> np.ndarray:
            made: np.ndarray = flow.tokens(latents.detach()).cpu().numpy()
            return made

        states = [tokens(state) for state, block in zip(trace.states, reversed(list(flow.blocks)), strict=True)
                  if not block.is_identity]  # fmt: skip
        clean = noisy - flow.noise_std**2 * gradient
        return Pairs(tokens(noise), np.stack(states, axis=1), tokens(clean), text.cpu().numpy())

    def _text(self, prompts: list[str]) -> np.ndarray:
        return np.array(self.pipe.conditions(prompts).astype(mx.float32))
