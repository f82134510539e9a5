"""The tokenizer of a new text encoder, and how much of a caption is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_starflow.training.recipes.text import LONGEST_TEXT, fitting_length, train_tokenizer

COLOURS = "red green blue black yellow white orange purple tiny huge shiny old".split()
THINGS = "fox hen owl cow cat dog boat house tree apple lamp chair bicycle guitar rocket".split()
PLACES = "on a hill,by the sea,under a bridge,in the snow,at night,in a garden,beside a river,in a forest".split(",")


@pytest.fixture
def captions() -> list[str]:
    """500 different ones, of ten words each or so."""
    rng = np.random.default_rng(0)
    found: dict[str, None] = {}
    while len(found) < 500:
        first, second = (f"a {rng.choice(COLOURS)} {rng.choice(THINGS)}" for _ in range(2))
        found[f"{first} and {second} {rng.choice(PLACES)}"] = None
    return list(found)


def test_few_captions_are_not_spelled(captions, tmp_path):
    tokenizer = train_tokenizer(captions, tmp_path / "spiece.model", 1500)
    ids = [tokenizer.encode(caption) for caption in captions]
    words = np.mean([len(caption.split()) for caption in captions])
    assert words + 1 == pytest.approx(np.mean([len(each) for each in ids]))
    assert 100 < tokenizer.vocab_size <= 1500
    length = fitting_length(captions, tokenizer, 4)
    rows, _, cut = tokenizer.batch(captions, length)
    assert not any(cut) and len(np.unique(rows, axis=0)) == 500
    assert length == max(map(len, ids)) <= 12


def test_words_that_never_come_again(tmp_path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 10))) for _ in range(900)]
    captions = [" ".join(rng.choice(words, 6)) for _ in range(300)]
    tokenizer = train_tokenizer(captions, tmp_path / "spiece.model", 1500)
    assert np.mean([len(tokenizer.encode(caption)) for caption in captions]) < 6 * 3
    assert tokenizer.vocab_size <= 1500


@pytest.mark.parametrize("captions", [["a fox"], ["a", "b"], ["ein Füchslein", "狐", "a" * 3000]])
def test_hardly_any_captions(captions, tmp_path):
    tokenizer = train_tokenizer(captions, tmp_path / "spiece.model", 1500)
    assert len({tuple(tokenizer.encode(caption)) for caption in captions}) == len(captions)
    assert 4 <= fitting_length(captions, tokenizer, 4) <= LONGEST_TEXT


def test_the_length_has_bounds(captions, tmp_path: Path):
    tokenizer = train_tokenizer(captions, tmp_path / "spiece.model", 1500)
    assert fitting_length(["a fox"], tokenizer, 12) == 12
    assert fitting_length([" ".join(captions)], tokenizer, 12) == LONGEST_TEXT
    assert fitting_length([" ".join(captions)], tokenizer, 200) == 200
