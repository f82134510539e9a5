"""Token ids against transformers' (arrays in tests/data/t5)."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import DATA

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.tokenizer import Tokenizer

DATA = DATA / "t5"
TEXTS = json.loads((DATA / "texts.json").read_text())
GOLDEN = {name: np.array(array) for name, array in mx.load(str(DATA / "golden.safetensors")).items()}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DATA / "spiece.model")


def test_ids_and_mask_are_transformers(tokenizer):
    ids, mask, truncated = tokenizer.batch(TEXTS, GOLDEN["input_ids"].shape[1])
    assert ids.dtype == mask.dtype == np.int32
    np.testing.assert_array_equal(ids, GOLDEN["input_ids"])
    np.testing.assert_array_equal(mask, GOLDEN["attention_mask"])
    assert truncated == [False, False, False, True]


def test_special_tokens(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.pad_token_id, tokenizer.eos_token_id) == (1000, 0, 1)
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode(" \n\t ") == [1]


def test_layout_does_not_matter(tokenizer):
    plain = tokenizer.encode("a red apple on the table.")
    for text in (
        " a red apple on the table.",
        "a  red\tapple\n\non the table.\n",
        "a\u00a0red\u3000apple on the table.",
    ):
        assert tokenizer.encode(text) == plain
    assert tokenizer.encode("ａ ﬁlm") == tokenizer.encode("a film")


def test_written_out_markers(tokenizer):
    a, cat = tokenizer.encode("a")[:-1], tokenizer.encode("cat")[:-1]
    assert tokenizer.encode("a </s> cat") == [*a, 1, *cat, 1]
    assert tokenizer.encode("a<pad>cat") == [*a, 0, *cat, 1]
    assert tokenizer.encode("<unk>") == [2, 1]


def test_truncation_keeps_eos(tokenizer):
    text = TEXTS[1]
    whole = tokenizer.encode(text)
    n = len(whole)
    for length in (1, 2, n - 1, n, n + 1):
        ids, mask, truncated = tokenizer.batch([text, ""], length)
        expected = whole if n <= length else [*whole[: length - 1], 1]
        assert ids[0].tolist() == expected + [0] * (length - len(expected))
        assert mask[0].tolist() == [1] * len(expected) + [0] * (length - len(expected))
        assert ids[1].tolist() == [1] + [0] * (length - 1)
        assert truncated == [n > length, False]


def test_an_empty_batch(tokenizer):
    ids, mask, truncated = tokenizer.batch([], 5)
    assert ids.shape == mask.shape == (0, 5)
    assert truncated == []


def test_argument_mistakes(tokenizer):
    with pytest.raises(StarflowError, match="at least 1"):
        tokenizer.batch(["a"], 0)
    with pytest.raises(StarflowError, match="list of prompts"):
        tokenizer.batch("a cat", 5)
    with pytest.raises(StarflowError, match="not valid Unicode at character 2"):
        tokenizer.encode("a \udcff")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 64])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(StarflowError, match="is not a SentencePiece model") as error:
        Tokenizer(path)
    assert "\n" not in str(error.value)


def test_cut_off_or_missing_file(tmp_path):
    path = tmp_path / "spiece.model"
    with pytest.raises(StarflowError, match=r"cannot read the tokenizer .*No such file"):
        Tokenizer(path)
    path.write_bytes((DATA / "spiece.model").read_bytes()[:100_000])
    with pytest.raises(StarflowError, match="is not a SentencePiece model"):
        Tokenizer(path)


@pytest.mark.torch
def test_against_transformers(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "spiece.model").write_bytes((DATA / "spiece.model").read_bytes())
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    texts = [
        *TEXTS, "  a", "a\tb\r\nc", "a\u200bb\u2028c", "\u00ad", "\u2581a b\u2581", "a\x00b\x07c",
        "e\u0301t\u00e9 \u00bd \u00b2", "\u65e5\u672c\u8a9e cat", "\U0001f600 cat", "\u0130stanbul", ":::??",
        "A cat's (3:2) 50% \"film\", 1,000!", "</s>", "a </s>b <pad> <unk>", "</s></s> a", "<s> </S>", "a </s",
        "a" * 300,
    ]  # fmt: skip
    for text in texts:
        assert tokenizer.encode(text) == theirs(text)["input_ids"], repr(text)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=16, return_tensors="np")
    ids, mask, _ = tokenizer.batch(texts, 16)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
