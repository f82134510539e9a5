"""Evaluation's networks and formulas against PyTorch's, transformers' and torch-fidelity's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.evaluation.clip_score import CLIPScorer
from mlx_starflow.evaluation.features import InceptionFeatures, inception_input
from mlx_starflow.evaluation.measures import Gaussian, frechet_distance, precision_recall, squared_discrepancy
from mlx_starflow.evaluation.statistics import read_statistics, write_statistics
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.clip_tokenizer import END, START, CLIPTokenizer
from mlx_starflow.models.inception import InceptionV3

pytestmark = pytest.mark.torch

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 48, 3), np.uint8)


# ---- Inception


@pytest.fixture(scope="module")
def weights() -> dict:
    """Random weights that keep activations at their size, under the file's names and in PyTorch's layout."""
    import torch

    rng, found = np.random.default_rng(1), {}
    for name, parameter in parameters(InceptionV3()).items():
        shape = parameter.shape
        if len(shape) == 4:
            shape = (shape[0], shape[3], *shape[1:3])
        values = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
        if len(shape) == 1:
            around = 1.0 if name.endswith(("bn.weight", "running_var")) else 0.0
            values = around + 0.2 * (rng.random(shape) - 0.5)
        found[name] = torch.tensor(np.asarray(values, np.float32))
    return found | {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(1)
        for name in found
        if name.endswith("running_var")
    }


@pytest.fixture(scope="module")
def inception_file(weights, tmp_path_factory) -> Path:
    import torch

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(weights, path)
    return path


def in_pytorch(weights: dict, x):
    """Inception-V3 of FID, block by block, with PyTorch's own layers."""
    import torch
    from torch.nn import functional as F

    def conv(name: str, x, stride: int = 1):
        weight = weights[f"{name}.conv.weight"]
        same = stride == 1 and not name.startswith(("Conv2d_1a", "Conv2d_2a", "Conv2d_4a"))
        padding = tuple(side // 2 for side in weight.shape[2:]) if same else 0
        statistics = [weights[f"{name}.bn.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(F.conv2d(x, weight, stride=stride, padding=padding), *statistics, eps=1e-3))

    def chain(block: str, x, *names: str, last: int = 1):
        for name in names[:-1]:
            x = conv(f"{block}.{name}", x)
        return conv(f"{block}.{names[-1]}", x, last)

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    for name, stride in (("Conv2d_1a_3x3", 2), ("Conv2d_2a_3x3", 1), ("Conv2d_2b_3x3", 1)):
        x = conv(name, x, stride)
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)))
    x = F.max_pool2d(x, 3, 2)
    double = [f"branch3x3dbl_{number}" for number in (1, 2, 3)]
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = [chain(b, x, "branch1x1"), chain(b, x, "branch5x5_1", "branch5x5_2"), chain(b, x, *double)]
        x = torch.cat([*parts, chain(b, average(x), "branch_pool")], 1)
    b = "Mixed_6a"
    x = torch.cat([chain(b, x, "branch3x3", last=2), chain(b, x, *double, last=2), F.max_pool2d(x, 3, 2)], 1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        single = chain(b, x, *(f"branch7x7_{number}" for number in (1, 2, 3)))
        twice = chain(b, x, *(f"branch7x7dbl_{number}" for number in (1, 2, 3, 4, 5)))
        x = torch.cat([chain(b, x, "branch1x1"), single, twice, chain(b, average(x), "branch_pool")], 1)
    b = "Mixed_7a"
    wide = chain(b, x, *(f"branch7x7x3_{number}" for number in (1, 2, 3, 4)), last=2)
    x = torch.cat([chain(b, x, "branch3x3_1", "branch3x3_2", last=2), wide, F.max_pool2d(x, 3, 2)], 1)
    for b, pool in (("Mixed_7b", average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        single, twice = chain(b, x, "branch3x3_1"), chain(b, x, *double[:2])
        ends = [(single, "3x3_2a"), (single, "3x3_2b"), (twice, "3x3dbl_3a"), (twice, "3x3dbl_3b")]
        parts = [chain(b, x, "branch1x1"), *(chain(b, part, f"branch{name}") for part, name in ends)]
        x = torch.cat([*parts, chain(b, pool(x), "branch_pool")], 1)
    return x.mean(dim=(2, 3))


@pytest.mark.parametrize("resize", ["tensorflow", "pytorch"])
def test_inception(weights, inception_file, resize) -> None:
    import torch

    images = torch.tensor(inception_input(PIXELS, resize)).permute(0, 3, 1, 2)
    expected = in_pytorch(weights, images).numpy()
    assert expected.std(axis=0).mean() > 1e-3  # pictures differ
    found = InceptionFeatures(inception_file, resize)(PIXELS)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_pytorchs_resizing() -> None:
    import torch

    images = torch.tensor(PIXELS).permute(0, 3, 1, 2) / 255
    resized = torch.nn.functional.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
    expected = (2 * resized - 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(inception_input(PIXELS, "pytorch") - expected).max() < 1e-5


# ---- torch-fidelity


@pytest.fixture
def fidelity(monkeypatch) -> Iterator[ModuleType]:
    """torch-fidelity. It imports torchvision for other features than these, so any will do."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    yield pytest.importorskip("torch_fidelity")
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]


def test_torch_fidelitys_inception(fidelity, inception_file) -> None:
    """Its network and its resizing, from the same file."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("x", ["2048"], str(inception_file))
    expected = network(torch.tensor(PIXELS).permute(0, 3, 1, 2))[0].numpy()
    found = InceptionFeatures(inception_file)(PIXELS)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((16, 16))
    first, second = rng.standard_normal((2, 300, 16)) @ mix
    return np.abs(first).astype(np.float32), np.abs(second + 0.3).astype(np.float32)


def test_torch_fidelitys_fid(fidelity, features) -> None:
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    pytest.importorskip("scipy")
    theirs = [fid_features_to_statistics(torch.tensor(each)) for each in features]
    expected = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert frechet_distance(*map(Gaussian.of, features)) == pytest.approx(expected, rel=1e-6)


def test_torch_fidelitys_kid(fidelity, features) -> None:
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    options = {"kid_subsets": 7, "kid_subset_size": 50, "rng_seed": 3, "verbose": False}
    expected = kid_features_to_metric(*map(torch.tensor, features), **options)["kernel_inception_distance_mean"]
    rng, found = np.random.RandomState(3), []
    for _ in range(7):
        subsets = [each[rng.choice(len(each), 50, replace=False)] for each in features]
        found.append(squared_discrepancy(*subsets))
    assert np.mean(found) == pytest.approx(expected, rel=1e-4)


def test_torch_fidelitys_precision_and_recall(fidelity, features) -> None:
    import torch
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, samples = features
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": True, "verbose": False}
    theirs = prc_features_to_metric(torch.tensor(samples), torch.tensor(real), **options)
    assert precision_recall(real, samples) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_sums_in_pytorch(tmp_path, features) -> None:
    """What we write loads there, and what torchmetrics writes loads here."""
    import torch

    gaussian = Gaussian.of(features[0])
    write_statistics(gaussian, tmp_path / "s.pth")
    sums = torch.load(tmp_path / "s.pth", weights_only=True)
    exact = torch.tensor(features[0]).double()
    assert torch.allclose(sums["real_features_cov_sum"], exact.T @ exact)
    assert sums["real_features_num_samples"] == 300 and sums["real_features_num_samples"].shape == ()
    names = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")
    values = (exact.sum(0), exact.T @ exact, torch.tensor(300))
    torch.save(dict(zip(names, values, strict=True)), tmp_path / "theirs.pth")
    assert frechet_distance(read_statistics(tmp_path / "theirs.pth"), gaussian) < 1e-6


# ---- CLIP

MERGES = ["h e", "l l", "he ll", "hell o</w>", "a t</w>", "c at</w>", "1 2</w>", "Ã ©</w>", "' s</w>", "! !</w>"]
TEXTS = [
    "Hello  cat's CAT!! 12", "héllo — “x” ½²3 x_y", "don't 'll we're\n\ttab", "e\u0301 日本語 ①",
    "a\u200bb \u3000c 'S", "",
]  # fmt: skip


def clip_folder(folder: Path, end: int | None, side: int = 16) -> Path:
    """A tiny random CLIP as transformers writes it; `end`: what its config says of the token that ends a text."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from mlx_starflow.models import clip_tokenizer

    characters = list(clip_tokenizer._byte_characters().values())
    tokens = [*characters, *(f"{each}</w>" for each in characters), *("".join(each.split()) for each in MERGES)]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 24,
        "eos_token_id": vocabulary[END] if end is None else end,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": side, "patch_size": 8, "hidden_act": "gelu",
    }  # fmt: skip
    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return folder


@pytest.mark.parametrize("end", [None, 2])
def test_clip(tmp_path, end) -> None:
    """Scores, with transformers' own tokenizer, preprocessing and network."""
    import torch
    from PIL import Image
    from transformers import CLIPModel

    folder = clip_folder(tmp_path / "clip", end)
    pixels = np.random.default_rng(3).integers(0, 256, (len(TEXTS), 20, 30, 3), np.uint8)
    tokenizer, texts = transformers_tokenizer(folder), [*TEXTS[:-1], "cat " * 40]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    resized = [Image.fromarray(each).resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16)) for each in pixels]
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    images = (np.stack([np.asarray(each) for each in resized]) / 255 - mean) / std
    images = torch.tensor(images.astype(np.float32)).permute(0, 3, 1, 2)
    network = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = network(**tokens, pixel_values=images)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(-1).clamp(min=0).numpy()
    assert expected.max() > 1
    np.testing.assert_allclose(CLIPScorer(folder)(pixels, texts), expected, atol=1e-3)


def transformers_tokenizer(folder: Path):
    from transformers import CLIPTokenizer as Theirs

    vocabulary = json.loads((folder / "vocab.json").read_text())
    return Theirs(vocab=vocabulary, merges=[tuple(each.split()) for each in MERGES])


def test_tokens(tmp_path) -> None:
    folder = clip_folder(tmp_path / "clip", None)
    theirs = transformers_tokenizer(folder)
    ours = CLIPTokenizer(json.loads((folder / "vocab.json").read_text()), MERGES, 24)
    for text in [*TEXTS, f"{END} a {START}b"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text


def test_older_weights_of_clip(tmp_path) -> None:
    """A pytorch_model.bin, with numbers of positions that are no weights, scores as model.safetensors does."""
    import torch

    folder = clip_folder(tmp_path / "clip", None)
    pixels = PIXELS[:2]
    expected = CLIPScorer(folder)(pixels, ["a cat", "12"])
    tensors = {name: torch.tensor(np.array(each)) for name, each in mx.load(str(folder / "model.safetensors")).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    np.testing.assert_allclose(CLIPScorer(folder)(pixels, ["a cat", "12"]), expected, atol=1e-4)
