"""Text by a flow: `TextPipeline` writes, fills gaps and scores; `load_text` opens one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.text import DRAWS, TextScore, score_characters
from mlx_starflow.media.noise import draw_noise, draw_seed
from mlx_starflow.model_dir.directory import load_text_flow
from mlx_starflow.models.text_flow import TextFlow, TextFlowConfig
from mlx_starflow.sampling import Certificate, certify
from mlx_starflow.sampling.gaps import fill_gaps
from mlx_starflow.sampling.methods import Method
from mlx_starflow.sampling.progress import Progress, Watch, watch

BLANK = "_"
"""Marks characters that are to be filled."""


@dataclass
class TextResult:
    """Texts that were made.

    Attributes:
        texts: all of them, with what was given.
        seed: of the first; the others have the seeds after it.
        certificates: of each piece of all texts, if they were asked for.
        evaluations: of networks, of all blocks.
        seconds: that it took.
    """

    texts: list[str]
    seed: int
    certificates: list[Certificate] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def certificate(self) -> Certificate | None:
        """That of all pieces together; None if there is none."""
        return Certificate.worst(self.certificates) if self.certificates else None


class TextPipeline:
    """A flow over text.

    Attributes:
        name: what it was opened by.
        flow: the flow.
    """

    def __init__(self, name: str, flow: TextFlow):
        self.name, self.flow = name, flow

    @property
    def config(self) -> TextFlowConfig:
        return self.flow.config

    @checked
    def generate(
        self,
        prompt: str = "",
        *,
        length: int | None = None,
        texts: int = 1,
        seed: int | None = None,
        temperature: float = 1.0,
        method: Method = "sequential",
        verify: bool = False,
        progress: Watch = None,
    ) -> TextResult:
        """Continue a prompt.

        Args:
            prompt: how the text begins.
            length: characters of the whole text; None: as many as the flow reads at once. Of a longer text each piece
                is written after the half window before it.
            texts: how many are made.
            seed: of the first, the others have those after it; None: drawn.
            temperature: of choices; below 1 likely characters become likelier.
            method: of sampling, see `sample`.
            verify: make a certificate of every piece.

        Raises:
            StarflowError: a wrong argument, a character that the model does not know, or a text that would end before
                it goes on after the prompt.
        """
        config, began = self.config, time.perf_counter()
        length = max(config.length, len(prompt) + 1) if length is None else length
        if length <= len(prompt):
            raise StarflowError(f"the text is to have {length} characters, and the prompt has {len(prompt)}: give more")
        if texts < 1:
            raise StarflowError(f"the number of texts must be 1 or more, not {texts}")
        result = TextResult([], draw_seed() if seed is None else seed)
        prompted = np.array(self.flow.characters(prompt), np.int32)
        made = np.repeat(prompted[None], texts, axis=0)
        watched, piece = watch(progress), 0
        while made.shape[1] < length:
            patch, most = config.patch_size, config.length
            past = (made.shape[1] if made.shape[1] + patch <= most else most // 2) // patch * patch
            given = np.zeros((texts, most), np.int32)
            given[:, :past] = made[:, made.shape[1] - past :]
            hidden = [place >= past for place in range(most)]
            filled = self._fill(given, hidden, piece, result, temperature, method, verify, watched)
            made, piece = np.concatenate([made, filled[:, past:]], axis=1), piece + 1
        result.texts = [self.flow.text(mx.array(row)) for row in made[:, :length]]
        result.seconds = time.perf_counter() - began
        return result

    @checked
    def fill(
        self,
        text: str,
        *,
        blank: str = BLANK,
        texts: int = 1,
        seed: int | None = None,
        temperature: float = 1.0,
        method: Method = "sequential",
        verify: bool = False,
        progress: Watch = None,
    ) -> TextResult:
        """Fill the gaps of a text, each character read with all that is given before and after it.

        Args:
            text: at most as long as the flow reads.
            blank: the character that stands for each one that is to be filled.

        The other arguments are those of `generate`.

        Raises:
            StarflowError: a wrong argument, no gap, a text that is too long, or a character that is not known.
        """
        began = time.perf_counter()
        if len(blank) != 1:
            raise StarflowError(f"a blank must be one character, not {blank!r}")
        if blank not in text:
            raise StarflowError(f"the text has no gap: write {blank} for each character that is to be filled")
        if len(text) > self.config.length:
            raise StarflowError(
                f"the text has {len(text)} characters, and the model reads {self.config.length} at once"
            )
        if texts < 1:
            raise StarflowError(f"the number of texts must be 1 or more, not {texts}")
        hidden = [character == blank for character in text]
        given = np.array(self.flow.characters(text.replace(blank, self.config.alphabet[0])), np.int32)
        result = TextResult([], draw_seed() if seed is None else seed)
        rows = np.repeat(given[None], texts, axis=0)
        filled = self._fill(rows, hidden, 0, result, temperature, method, verify, watch(progress))
        result.texts = [self.flow.text(mx.array(row)) for row in filled]
        result.seconds = time.perf_counter() - began
        return result

    def _fill(
        self,
        given: np.ndarray,
        hidden: Sequence[bool],
        piece: int,
        result: TextResult,
        temperature: float,
        method: Method,
        verify: bool,
        progress: Progress,
    ) -> np.ndarray:
        """Texts `[B, T]` whose hidden characters are sampled given the others."""
        seeds = [result.seed + number for number in range(len(given))]
        # Pieces of one text take different parts of a seed's random numbers; the first half is the codebook's.
        size = self.config.size
        drawn = draw_noise(seeds, (piece + 1, 2, len(hidden), size))[:, piece]
        flow = self.flow.filling(hidden).at_temperature(temperature)
        x = flow.codebook.encode(mx.array(given), mx.array(drawn[:, 0]))
        filled = fill_gaps(flow, x, mx.array(drawn[:, 1]), hidden, method, progress)
        result.evaluations += filled.evaluations
        if verify:
            result.certificates.append(certify(flow, filled.x, filled.z, progress=progress))
        decoded = np.array(flow.codebook.decode(filled.x), np.int32)
        return np.where(np.array(hidden), decoded, given)

    @checked
    def score(self, text: str, *, draws: int = DRAWS, seed: int = 0, progress: Watch = None) -> TextScore:
        """Bits per character of a text, see `likelihood.text.score_characters`."""
        return score_characters(
            self.flow, np.array(self.flow.characters(text), np.int32), draws=draws, seed=seed, progress=progress
        )


@checked
def load_text(name: str | Path, *, dtype: str | mx.Dtype | None = None, download: bool = True) -> TextPipeline:
    """Load a model of text: a model directory, or a Hub repository of one.

    Args:
        dtype: precision of the network; by default float32 on a CPU and bfloat16 on a GPU.
        download: False: a repository must be on this machine already.

    Raises:
        StarflowError: there is no such model, it is damaged, or it is no model of text.
    """
    return TextPipeline(str(name), load_text_flow(name, dtype, download=download))
