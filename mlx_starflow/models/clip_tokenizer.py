"""Texts to CLIP's token ids: byte pairs of lower-case words, from `vocab.json` and `merges.txt`.

The ids are those of transformers' CLIP tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from mlx_starflow.errors import StarflowError

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")


class CLIPTokenizer:
    """CLIP's byte-pair encoding.

    Attributes:
        start, end: numbers of the tokens around every text.
        length: tokens a text, both of these included; longer texts are cut.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[str], length: int):
        """`vocab`: ids by token; `merges`: the lines of `merges.txt`.

        Raises:
            StarflowError: a token that every text needs is missing.
        """
        for name in (START, END):
            if name not in vocab:
                raise StarflowError(f"the vocabulary of CLIP's tokenizer has no token {name}")
        pairs = [tuple(line.split()) for line in merges if not line.startswith("#version")]
        self._vocab = vocab
        self._ranks = {pair: rank for rank, pair in enumerate(pair for pair in pairs if len(pair) == 2)}
        self._bytes = _byte_characters()
        self.start, self.end, self.length = vocab[START], vocab[END], length

    def encode(self, text: str) -> list[int]:
        """Ids of one text, with the tokens around it, neither cut nor padded.

        Raises:
            StarflowError: the text is not valid Unicode.
        """
        text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise StarflowError(f"the prompt is not valid Unicode at character {error.start}; retype it") from None
        ids = [self._vocab.get(token, self.end) for word in _words(text) for token in self._tokens(word)]
        return [self.start, *ids, self.end]

    def batch(self, texts: Sequence[str]) -> np.ndarray:
        """Ids of texts, int32 `[B, length]`, cut, and filled up with the token that ends a text."""
        out = np.full((len(texts), self.length), self.end, np.int32)
        for row, text in zip(out, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > self.length:
                ids = [*ids[: self.length - 1], self.end]
            row[: len(ids)] = ids
        return out

    def _tokens(self, word: str) -> list[str]:
        if word in (START, END):
            return [word]
        parts = [self._bytes[byte] for byte in word.encode()]
        parts[-1] += _WORD_END
        while len(parts) > 1:
            ranked = [(self._ranks[pair], pair) for pair in pairwise(parts) if pair in self._ranks]
            if not ranked:
                break
            parts = _merged(parts, min(ranked)[1])
        return parts


def _merged(parts: list[str], pair: tuple[str, ...]) -> list[str]:
    out: list[str] = []
    place = 0
    while place < len(parts):
        if tuple(parts[place : place + 2]) == pair:
            out.append("".join(pair))
            place += 2
        else:
            out.append(parts[place])
            place += 1
    return out


def _words(text: str) -> list[str]:
    """Contractions, runs of letters, single numerals, runs of anything else but spaces."""
    found: list[str] = []
    place = 0
    while place < len(text):
        special = next((name for name in (START, END) if text.startswith(name, place)), "")
        match = _CONTRACTION.match(text, place)
        end = place + 1
        if special:
            end = place + len(special)
        elif match is not None:
            end = match.end()
        elif (kind := _kind(text[place])) == " ":
            place += 1
            continue
        elif kind != "N":
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        found.append(text[place:end])
        place = end
    return found


def _kind(character: str) -> str:
    """ "L" of a letter, "N" of a numeral, " " of a space, "" of anything else."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else ""


def _byte_characters() -> dict[int, str]:
    """A printable character for each byte, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
