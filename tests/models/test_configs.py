"""What a config may say: types, sizes, and how its values must go together."""

from __future__ import annotations

import pytest
from helpers.commands import message
from helpers.tiny_flows import FAMILIES, MODELS

from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan import AutoencoderWanConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Config
from mlx_starflow.models.tarflow import TarFlowConfig

IMAGE = MODELS["image"]
TEXT = FAMILIES["language_model"]
KINDS = {
    FlowConfig: IMAGE,
    TarFlowConfig: MODELS["classes"],
    T5Config: {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4},
    AutoencoderKLConfig: {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    AutoencoderWanConfig: {
        "model_type": "autoencoder_wan", "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "z_dim": 4, "base_dim": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"top_block": {"use_proj_txt": False}}, "the width of the text, 32, must be the block's, 64"),
        ({"top_block": {"head_dim": 32}}, "head_dim 32 without hf_style_rope must be the flow's, 64"),
        ({"top_block": {"in_channels": 8}}, "in_channels must be the flow's, 4, not 8"),
        ({"top_block": {"txt_dim": 8}}, "txt_dim must be the flow's, 32, not 8"),
        ({"top_block": {"local": True}}, "local must be the flow's, False, not True"),
        ({"top_block": {"num_heads": 0}}, "top_block: num_heads must be a positive integer"),
        ({"top_block": {"norm_type": "none"}}, "norm_type must be layer_norm or rms_norm"),
        ({"top_block": {"num_layers": 10**9}}, "num_layers must be at most"),
        ({"top_block": {"nonsense": 1}}, "top_block: unknown key nonsense"),
        ({"top_block": 3}, "top_block must hold names and values"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads 3 is no multiple of num_kv_heads 2"),
        ({"cond_top_only": False, "shallow_block_local": True}, "(local) cannot read text"),
        ({"img_size": 0}, "img_size must be a positive integer, not 0"),
        ({"patch_size": 8}, "pt_seq_len must be a positive integer, not 0"),
        ({"head_dim": 63}, "must be even"),
        ({"head_dim": 8}, "16 or more for a flow that reads text"),
        ({"head_dim": 128}, "num_heads must be a positive integer, not 0"),
        ({"layers_per_block": [1, 10**9]}, "layers_per_block[1] must be at most"),
        ({"layers_per_block": [4000, 4000]}, "more than 4096 layers"),
        ({"layers_per_block": []}, "layers_per_block is empty"),
        ({"layers_per_block": "1 a"}, "layers_per_block[1] must be an integer of at least 0, not 'a'"),
        ({"noise_std": float("nan")}, "noise_std must be a number"),
        ({"noise_std": -1.0}, "noise_std must be at least 0"),
        ({"vid_size": "a:b", "temporal_causal": 1, "shallow_block_local": True}, "vid_size, frames"),
    ],
)
def test_flows_that_cannot_be(changes, text):
    assert text in message(FlowConfig.from_dict, {**IMAGE, **changes})


def test_a_deep_block_of_its_own_is_fine():
    """A language model's: other widths, with text as wide as it is, and its own rotary positions."""
    assert FlowConfig.from_dict(TEXT).blocks[-1].head_dim == 8


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("noise_std", "1e-4", 1e-4),
        ("channels", 64.0, 64),
        ("use_softplus", 1, True),
        ("layers_per_block", "1 2", [1, 2]),
    ],
)
def test_numbers_that_were_written_otherwise(key, value, expected):
    config = FlowConfig.from_dict({**IMAGE, key: value})
    assert getattr(config, key) == expected and type(getattr(config, key)) is type(expected)


WRONG = ([], {}, "x", "", 1.5, -1, 0, True, 10**9, 10**400, float("nan"), [None], {"a": 1}, ["x"] * 3, [[1]], b"")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_wrong_values_are_told_in_one_line(kind):
    """Of every key, or they are usable."""
    good = KINDS[kind]
    kind.from_dict(good)
    for key in [*kind.__dataclass_fields__, "act_fn", "down_block_types", "model_type", "is_residual"]:
        for value in WRONG:
            try:
                kind.from_dict({**good, key: value})
            except Exception as error:
                assert type(error).__name__ == "StarflowError" and "\n" not in str(error), (key, value, error)
                assert len(str(error)) < 500


@pytest.mark.parametrize("key", ["num_layers", "d_ff"])
def test_sizes_are_bounded(key):
    assert "must be at most" in message(T5Config.from_dict, {**KINDS[T5Config], key: 10**9})
    assert "more than 4096 layers" in message(TarFlowConfig.from_dict, {**MODELS["classes"], "blocks": 10**6})
    assert "layers" in message(AutoencoderKLConfig.from_dict, {**KINDS[AutoencoderKLConfig], "layers_per_block": 10**6})
