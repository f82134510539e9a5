"""Noise that does not lead back to a picture, and pictures that are not what their noise leads to."""

from __future__ import annotations

import pytest
from helpers.commands import Command
from helpers.paths import TESTS

FOX = TESTS / "demo/fox.png"
encode, decode, edit = Command("encode"), Command("decode"), Command("edit")


def warned(result):
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    return [line for line in lines if "numbers left float16's range" not in line]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    out = tmp_path_factory.mktemp("noise") / "z.safetensors"
    assert not warned(encode(FOX, "-p", "a fox", "--guidance", 5, "-o", out))
    return out


def test_encode(noise, tmp_path):
    out = tmp_path / "z.safetensors"
    said = encode.mistake(FOX, "-p", "a fox", "--guidance", 1e6, "-o", out)
    assert "this noise is not the picture's; try a lower guidance" in said
    assert not out.exists()
    assert not warned(encode(FOX, "-p", "a fox", "--guidance", 1e3, "--no-check", "-o", out, "--overwrite"))


def test_decode(noise, tmp_path):
    assert not warned(decode(noise, "-o", tmp_path / "o.png"))
    (line,) = warned(decode(noise, "--guidance", 1e6, "-o", tmp_path / "o.png"))
    assert "the result is not what its noise leads to" in line


def test_edit(tmp_path):
    def reprompt(strength, *words):
        out = tmp_path / "o.png"
        words = ["--from", "a fox", "--to", "a cat", "--strength", strength, *words]
        return warned(edit("reprompt", FOX, *words, "-o", out))

    assert not reprompt(1.5)
    (line,) = reprompt(1e6, "--method", "sequential")
    assert "try a lower guidance or strength" in line
    (line,) = reprompt(1e6)
    assert "the sampling plan allows 1.0e-02; give the method sequential" in line
    out = tmp_path / "o.png"
    assert not warned(edit("vary", FOX, "-p", "a fox", "-o", out))
    assert not warned(edit("interpolate", FOX, FOX, "--from", "a fox", "--to", "a fox", "--frames", 3, "-o", out))
