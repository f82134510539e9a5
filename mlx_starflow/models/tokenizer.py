"""Prompts to T5 token ids, on SentencePiece alone.

The ids are those of transformers' T5 tokenizer: SentencePiece's own, then `</s>`. SentencePiece normalises (NFKC; any
run of spaces, line breaks and tabs is one space; none at the ends), so a prompt's layout does not reach the model.
Two things differ from transformers: its sentinels (`<extra_id_0>`) are plain text here, and combining marks that its
Rust tokenizer drops after ligatures and special spaces are kept, as SentencePiece keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from mlx_starflow.errors import StarflowError, one_line


class Tokenizer:
    """T5's tokenizer.

    Attributes:
        vocab_size: number of SentencePiece pieces; every id is below it. (Checkpoints have more embeddings: sentinel
            tokens for pretraining, which prompts do not use, and padding.)
        eos_token_id: ends every prompt, 1 in T5.
        pad_token_id: fills up a batch, 0 in T5.
    """

    def __init__(self, spiece_model_path: str | Path):
        """Load a `spiece.model`.

        Raises:
            StarflowError: the file is missing, not a SentencePiece model, or has no `</s>` or `<pad>`.
        """
        path = Path(spiece_model_path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StarflowError(f"cannot read the tokenizer {path}: {one_line(error)}") from error
        try:
            if not data:
                raise RuntimeError("the file is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise StarflowError(f"{path} is not a SentencePiece model; download spiece.model again") from error
        self.vocab_size: int = self._model.vocab_size()
        self.eos_token_id: int = self._model.eos_id()
        self.pad_token_id: int = self._model.pad_id()
        if self.eos_token_id < 0 or self.pad_token_id < 0:
            raise StarflowError(f"{path} is not a T5 tokenizer: it has no </s> or no <pad>; use T5's spiece.model")
        markers = (self.eos_token_id, self.pad_token_id, self._model.unk_id())
        try:
            self._markers = {self._model.id_to_piece(i): i for i in markers}
        except (IndexError, ValueError, RuntimeError) as error:  # pieces that are no UTF-8, among others
            raise StarflowError(f"{path} is damaged; download spiece.model again") from error
        self._split_markers = re.compile("(" + "|".join(map(re.escape, self._markers)) + ")")

    def encode(self, text: str) -> list[int]:
        """Ids of one prompt, `</s>` at the end, neither padded nor truncated.

        As in transformers, `</s>`, `<pad>` and `<unk>` written out in a prompt become these tokens.

        Raises:
            StarflowError: the prompt is not text that UTF-8 can write.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise StarflowError(f"the prompt is not valid Unicode at character {error.start}; retype it") from error
        ids: list[int] = []
        for part in self._split_markers.split(text):
            ids += [self._markers[part]] if part in self._markers else self._model.encode(part)
        return [*ids, self.eos_token_id]

    def batch(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, list[bool]]:
        """Ids of several prompts at a fixed length.

        Args:
            texts: B prompts.
            length: tokens a prompt, `</s>` included. Shorter prompts are padded, longer ones cut; a cut prompt still
                ends in `</s>`.

        Returns:
            `ids`, int32 `[B, length]`; `mask`, int32 `[B, length]`, 1 for tokens and 0 for padding; and for each prompt
            whether it was cut.

        Raises:
            StarflowError: `length` is less than 1, or `texts` is a single string.
        """
        if isinstance(texts, str):
            raise StarflowError("batch() takes a list of prompts; wrap a single one: batch([text], length)")
        if length < 1:
            raise StarflowError(f"the text length must be at least 1 token, not {length}")
        ids = np.full((len(texts), length), self.pad_token_id, np.int32)
        mask = np.zeros((len(texts), length), np.int32)
        truncated = []
        for row, text in enumerate(texts):
            tokens = self.encode(text)
            truncated.append(len(tokens) > length)
            if truncated[-1]:
                tokens = [*tokens[: length - 1], self.eos_token_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask, truncated
