from __future__ import annotations

import pytest
from helpers.paths import DATA

from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.pipelines.prompts import complete_prompt

SPIECE = DATA / "t5/spiece.model"


def config(**changes: object) -> FlowConfig:
    sizes = {"img_size": 4, "channel_size": 4, "patch_size": 1, "channels": 64, "layers_per_block": [1, 1]}
    return FlowConfig(**{**sizes, **changes})


def test_most_models_read_the_prompt_alone():
    assert complete_prompt("a  cat\n", config(), ratio="3:2", fps=16) == "a  cat\n"
    assert complete_prompt("", config()) == ""


@pytest.mark.parametrize(
    ("changes", "arguments", "prompt", "expected"),
    [
        ({"mix_aspect": True}, {"ratio": "3:2"}, "a cat", "a cat\n in a 3:2 aspect ratio.\n"),
        ({"mix_aspect": True}, {"ratio": "9:21"}, "", "\n in a 9:21 aspect ratio.\n"),
        ({"fps_cond": True}, {}, "a cat", "An image:\na cat\n"),
        ({"fps_cond": True}, {"fps": 16}, "a cat", "A video with 16 fps:\na cat\n"),
        ({"cond_noise_level": True, "noise_std": 0.3}, {}, "a cat", "Noise Level 300:\na cat"),
        (
            {"mix_aspect": True, "fps_cond": True, "cond_noise_level": True, "noise_std": 0.5},
            {"ratio": "16:9", "fps": 24},
            "a cat",
            "Noise Level 500:\nA video with 24 fps:\na cat\n\n in a 16:9 aspect ratio.\n",
        ),
    ],
)
def test_the_tokens_are_the_releases(changes, arguments, prompt, expected):
    """`expected` is the release's text; only its layout differs from ours."""
    tokenizer = Tokenizer(SPIECE)
    text = complete_prompt(prompt, config(**changes), **arguments)
    assert text == " ".join(expected.split())
    assert tokenizer.encode(text) == tokenizer.encode(expected)
