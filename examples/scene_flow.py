"""The embedded model's flow and text encoder: latents made as they are needed, captions worded anew each time."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from scene_autoencoder import to_pictures
from scene_data import Sample, Stream, sheet
from scene_pictures import Renderer
from scene_recipe import NOISE, PIPELINE, TEXT_LENGTH, Recipe
from scene_words import objects, plural
from torch import Tensor
from torch_loop import Device, train
from torch_training import TextFlow, flow_loss, to_tensor, tokens

from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.reference.autoencoder_kl import AutoencoderKL
from mlx_starflow.reference.sampling import denoise, sample
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.t5 import T5Encoder
from mlx_starflow.training.data.dropout import context_share
from mlx_starflow.training.recipes.text import train_tokenizer

NOT_TRAINED_ON = 10**9
"""Samples of the training stream from this number on are for looking at, not for training."""

PADDED_FROM = 0.75
"""The part of the training after which batches have their captions at full length. Before that they end with the
longest one: padding is most of it, and a third of all positions that the deep block computes."""

PROMPTS = [
    *["a fox", "a red apple on a blue background", "a big penguin in the snow", "three donuts on a table"],
    *["a cat to the left of a dog", "a rocket above a moon at night", "two fish under water", "a small house on grass"],
    *["a robot and a sunflower on a yellow background", "an umbrella in the rain", "a car below a rainbow"],
    "a guitar at sunset",
]


class Latents:
    """Normalized latents of the training stream `[n, 16, 16, 4]`, in shards on disk, made when they are needed."""

    def __init__(self, recipe: Recipe, renderer: Renderer, autoencoder: AutoencoderKL, folder: Path, device: Device):
        self.recipe, self.renderer, self.autoencoder, self.folder, self.device = (
            recipe,
            renderer,
            autoencoder,
            folder,
            device,
        )
        folder.mkdir(exist_ok=True)
        self.shards: list[np.ndarray] = []
        self.grow(1)
        first = self.shards[0].astype(np.float32)
        self.mean, self.std = first.mean(axis=(0, 1, 2)), first.std(axis=(0, 1, 2))

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """The posterior's means, raw, float32 `[n, 16, 16, 4]`."""
        parts = []
        for start in range(0, len(pictures), 50):
            with self.device.autocast():
                mean = self.autoencoder.encode(to_tensor(pictures[start : start + 50], self.device.name))[0]
            parts.append(mean.float().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def normalized(self, pictures: np.ndarray) -> Tensor:
        return torch.from_numpy((self.encode(pictures) - self.mean) / self.std)

    def grow(self, count: int) -> None:
        """Have at least so many shards, up to the recipe's; what lies on disk is read."""
        for index in range(len(self.shards), min(count, self.recipe.shards)):
            path = self.folder / f"{index:03d}.npy"
            if not path.is_file():
                numbers = range(index * self.recipe.shard, (index + 1) * self.recipe.shard)
                encoded = [self.encode(part) for part in self.pictures(numbers)]
                with open(path.with_suffix(".unfinished"), "wb") as file:
                    np.save(file, np.concatenate(encoded).astype(np.float16))
                os.replace(path.with_suffix(".unfinished"), path)
                print(f"latents of scenes {numbers.start} to {numbers.stop - 1}", flush=True)
            self.shards.append(np.load(path))

    def pictures(self, numbers: range) -> Iterable[np.ndarray]:
        """The pictures of scenes by number, a hundred at a time; drawn by all processes that the device has for it."""
        parts = [numbers[i : i + 100] for i in range(0, len(numbers), 100)]
        render = _Render(Stream(self.renderer))
        if not self.device.workers:
            return map(render, parts)
        # Forked processes have the sprites; sending them along would take longer than drawing.
        _Render.shared = render
        with multiprocessing.get_context("fork").Pool(self.device.workers) as pool:
            return pool.map(_Render.draw_shared, parts)

    def __getitem__(self, numbers: np.ndarray) -> Tensor:
        """Normalized latents of scenes of the stream, by number."""
        raw = np.stack([self.shards[n // self.recipe.shard][n % self.recipe.shard] for n in numbers])
        return torch.from_numpy((raw.astype(np.float32) - self.mean) / self.std)


@dataclass(frozen=True)
class _Render:
    stream: Stream
    shared: ClassVar[_Render]

    def __call__(self, numbers: range) -> np.ndarray:
        return np.stack([self.stream[n].picture for n in numbers])

    @classmethod
    def draw_shared(cls, numbers: range) -> np.ndarray:
        return cls.shared(numbers)


def tokenizer_for(recipe: Recipe, path: Path) -> Tokenizer:
    """A tokenizer in which every word of the captions, those of held-out objects too, is one piece.

    It learns from pairs of words, each with many neighbours: from whole captions, of which a few patterns make all, it
    learns pieces that cut the commonest words in two.
    """
    names = [name for thing in objects().values() for name in (thing.name, *thing.others)]
    texts = [*names, *map(plural, names), *(Stream(None, 3)[n].caption for n in range(3000))]
    words = sorted({word.strip(",") for text in texts for word in text.split()})
    pairs = [f"{word}, {words[(i + 7 * k) % len(words)]}" for k in (1, 2, 3) for i, word in enumerate(words)]
    return train_tokenizer(pairs, path, recipe.vocabulary)


class Captioned:
    """Batches for the flow: latents and token ids of captions, which are worded anew each time; one in ten is empty."""

    def __init__(self, latents: Latents, tokenizer: Tokenizer, recipe: Recipe):
        self.latents, self.tokenizer, self.recipe, self.stream = latents, tokenizer, recipe, Stream(None)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        recipe = self.recipe
        self.latents.grow(2 + step // recipe.grow if recipe.grow else recipe.shards)
        rng = np.random.default_rng([5, step])
        numbers = rng.choice(len(self.latents.shards) * recipe.shard, recipe.flow_batch, replace=False)
        texts = [self.stream.other_caption(n, rng) if rng.random() >= 0.1 else "" for n in numbers]
        return self.latents[numbers], *tokens(self.tokenizer, texts, TEXT_LENGTH)


def train_flow(
    recipe: Recipe,
    latents: Latents,
    tokenizer: Tokenizer,
    out: Path,
    device: Device,
    seconds: float | None,
    deadline: float,
    saved: Callable[[], None],
) -> TextFlow:
    """Train for the recipe's steps or for so many seconds, and call `saved` after each checkpoint; see `train`."""
    torch.manual_seed(0)
    text_config = recipe.text_config(tokenizer.vocab_size)
    model = TextFlow(STARFlow(recipe.flow_config()), T5Encoder(text_config)).to(device.name)
    print({name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}, flush=True)
    device.compile(model.flow, model.text_encoder)

    def loss(batch: tuple, progress: float) -> tuple[Tensor, dict[str, float]]:
        full = context_share(0.5, progress)
        latents, ids, mask = (part.to(device.name, non_blocking=True) for part in batch)
        if progress < PADDED_FROM and not device.is_cuda:
            longest = int(mask.sum(dim=1).max())
            ids, mask = ids[:, :longest], mask[:, :longest]
        value, numbers = flow_loss(model, latents, ids, mask, noise_std=NOISE, full=full, partial=0.3)
        return value, {name: number for name, number in numbers.items() if math.isfinite(number)}

    @cache
    def watched(kind: str) -> tuple[Tensor, list[str]]:
        first = NOT_TRAINED_ON if kind == "train" else 0
        samples = [Stream(latents.renderer, 0, kind)[first + n] for n in range(4 * recipe.flow_batch)]
        return latents.normalized(np.stack([s.picture for s in samples])), [s.caption for s in samples]

    @torch.no_grad()
    def watch(averaged: TextFlow, step: int) -> str:
        """NLL of scenes of all kinds, given their captions; and a sheet of samples."""
        report = []
        generator = torch.Generator().manual_seed(1)
        for kind in ("train", "pair", "background", "role", "object"):
            clean, captions = watched(kind)
            noisy = (clean + NOISE * torch.randn(clean.shape, generator=generator)).to(device.name)
            with device.autocast():
                text = averaged.text_encoder.encode(
                    *(t.to(device.name) for t in tokens(tokenizer, captions, TEXT_LENGTH))
                )
                report.append(f"{kind} {averaged.flow(noisy, text).nll().mean():.4f}")
        (out / "samples").mkdir(exist_ok=True)
        drawn = draw(averaged, latents, tokenizer, PROMPTS, device)
        samples = [Sample(None, prompt, picture) for prompt, picture in zip(PROMPTS, drawn, strict=True)]
        sheet(samples).save(out / "samples" / f"{step:06d}.png")
        return "nll " + ", ".join(report)

    return train(
        model,
        loss,
        Captioned(latents, tokenizer, recipe),
        model.groups(recipe.flow_lr, 8.0),
        out / "flow.pt",
        device,
        steps=recipe.flow_steps,
        seconds=seconds,
        deadline=deadline,
        saved=saved,
        watch=watch,
        watch_every=5000 if device.is_cuda else 1000,
    )


def draw(model: TextFlow, latents: Latents, tokenizer: Tokenizer, prompts: list[str], device: Device) -> np.ndarray:
    """Pictures of prompts, uint8, with the guidance and temperature of the model directory."""
    text, null = (
        model.text_encoder.encode(*(t.to(device.name) for t in tokens(tokenizer, texts, TEXT_LENGTH))).float().detach()
        for texts in (prompts, [""])
    )
    z = PIPELINE["temperature"] * torch.randn(len(prompts), 16, 16, 4, generator=torch.Generator().manual_seed(1))
    with torch.enable_grad():
        x = denoise(model.flow, sample(model.flow, z.to(device.name), text, null, PIPELINE["guidance"]), text)
    raw = x.cpu().numpy() * latents.std + latents.mean
    with torch.no_grad(), device.autocast():
        return to_pictures(latents.autoencoder.decode(torch.from_numpy(raw).permute(0, 3, 1, 2).to(device.name)))
