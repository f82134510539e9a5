"""Lists of prompts in the formats of GenEval and HPSv2, and plain ones."""

from __future__ import annotations

import json

import pytest
from helpers.commands import message

from mlx_starflow.evaluation.prompts import ListedPrompt, read_prompts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]


def test_geneval(tmp_path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    expected = [("a photo of a bench", "single_object"), ("a photo of two cows", "counting")]
    assert read_prompts(path) == [ListedPrompt(*each) for each in expected]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["a", "b"], [("a", ""), ("b", "")]),  # anime.json and its like
        ({"anime": ["a"], "photo": ["b", "c"]}, [("a", "anime"), ("b", "photo"), ("c", "photo")]),
        ([{"prompt": "a", "image_path": ["x"]}], [("a", "")]),  # test.json
    ],
)
def test_hpsv2(tmp_path, content, expected) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    assert read_prompts(path) == [ListedPrompt(*each) for each in expected]


def test_one_a_line(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert read_prompts(path) == [ListedPrompt("a cat"), ListedPrompt("a dog")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.json", "{", "not valid JSON"),
        ("p.json", '"a"', "expected a list of prompts"),
        ("p.json", "[1]", "expected a prompt"),
        ("p.json", "[]", "holds 0 prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected a prompt"),
        ("p.jsonl", '{"prompt": "a"}\nb\n', "line 2 is not valid JSON"),
        ("p.txt", "\n", "holds 0 prompts"),
    ],
)
def test_lists_that_are_none(tmp_path, name, content, said) -> None:
    (tmp_path / name).write_text(content)
    assert said in message(read_prompts, tmp_path / name)
