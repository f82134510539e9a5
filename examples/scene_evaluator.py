"""A small classifier of scenes, to check what a flow draws: which objects, where, how many, on which background.

It is no part of the model: it learns from the same renderer, from all combinations, those that the flow never sees
included, and from slightly blurred and noisy pictures too, as a flow's are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scene_data import Stream
from scene_pictures import Renderer
from scene_words import BACKGROUNDS, LAYOUTS, HeldOut, Scene, objects
from torch import Tensor, nn
from torch_loop import Device, read_averaged, train
from torch_training import to_tensor

NOTHING_HELD_OUT = HeldOut(frozenset(), frozenset(), frozenset(), frozenset())
NOTHING = "nothing"
"""The second object of a scene with one kind of thing, and a background that no caption names."""

CLASSES: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "first": tuple(objects()),
    "second": (*objects(), NOTHING),
    "top": (*BACKGROUNDS, NOTHING),
    "bottom": (*BACKGROUNDS, NOTHING),
}
"""What is told apart: the arrangement, the left or upper object, the other one, the background above and below."""


def labels(scene: Scene) -> dict[str, str]:
    """The right class of each kind for a scene."""
    backgrounds = scene.backgrounds or (NOTHING,)
    second = scene.objects[1] if len(scene.objects) == 2 else NOTHING
    return {
        "layout": scene.layout,
        "first": scene.objects[0],
        "second": second,
        "top": backgrounds[0],
        "bottom": backgrounds[-1],
    }


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.short(x))


class Evaluator(nn.Module):
    """Pictures `[B, 3, 128, 128]` in -1..1 -> features `[B, 256]` and the logits of every kind."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *[Residual(a, b, 2) for a, b in itertools.pairwise(widths)],
            Residual(widths[-1], widths[-1], 1),
        )
        self.squeeze = nn.Conv2d(widths[-1], 2 * width, 1)
        self.features = nn.Linear(2 * width * 64, 256)
        self.heads = nn.ModuleDict({kind: nn.Linear(256, len(names)) for kind, names in CLASSES.items()})

    def forward(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(F.relu(self.squeeze(self.trunk(pictures))).flatten(1))
        return features, {kind: head(F.relu(features)) for kind, head in self.heads.items()}


class Labelled:
    """Batches of pictures, uint8 `[B, 128, 128, 3]`, and class numbers `[B, kinds]`."""

    def __init__(self, renderer: Renderer, size: int):
        self.stream, self.size = Stream(renderer, 4, held_out=NOTHING_HELD_OUT), size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        samples = [self.stream[step * self.size + i] for i in range(self.size)]
        numbers = [[CLASSES[kind].index(name) for kind, name in labels(s.scene).items()] for s in samples]
        return torch.from_numpy(np.stack([s.picture for s in samples])), torch.tensor(numbers)


def worsen(pictures: Tensor) -> Tensor:
    """Half of the pictures blurred, half of them noisy, by random amounts."""
    blur = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2.0, mode="bilinear")
    share = torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    pictures = torch.lerp(pictures, blur, (2 * share - 1).clamp(min=0))
    level = 0.15 * (2 * torch.rand_like(share) - 1).clamp(min=0)
    return pictures + level * torch.randn_like(pictures)


def train_evaluator(renderer: Renderer, checkpoint: Path, device: Device, steps: int, size: int = 48) -> Evaluator:
    torch.manual_seed(0)
    model = Evaluator().to(device.name, memory_format=torch.channels_last)

    def loss(batch: tuple[Tensor, Tensor], progress: float) -> tuple[Tensor, dict[str, float]]:
        pictures, numbers = worsen(to_tensor(batch[0], device.name)), batch[1].to(device.name)
        with device.autocast():
            _, logits = model(pictures)
        each = {
            kind: F.cross_entropy(values.float(), numbers[:, i], label_smoothing=0.02)
            for i, (kind, values) in enumerate(logits.items())
        }
        return sum(each.values()), {kind: value.item() for kind, value in each.items()}

    def watch(averaged: Evaluator, step: int) -> str:
        samples = [Stream(renderer, 6, held_out=NOTHING_HELD_OUT)[n] for n in range(200)]
        found = Judge(averaged, device)([s.picture for s in samples])
        wanted = [labels(s.scene) for s in samples]
        return "right: " + ", ".join(
            f"{kind} {np.mean([v.classes[kind] == w[kind] for v, w in zip(found, wanted, strict=True)]):.1%}"
            for kind in CLASSES
        )

    batches, groups = Labelled(renderer, size), [{"params": list(model.parameters()), "lr": 1e-3}]
    return train(model, loss, batches, groups, checkpoint, device, steps=steps, watch=watch, watch_every=500)


@dataclass(frozen=True)
class Verdict:
    """What the evaluator sees in a picture: the class of each kind, and its features `[256]`."""

    classes: dict[str, str]
    features: np.ndarray

    def shows(self, name: str) -> bool:
        return name in (self.classes["first"], self.classes["second"])

    def has_background(self, scene: Scene) -> bool:
        return all(self.classes[kind] == labels(scene)[kind] for kind in ("top", "bottom"))

    def has_layout(self, scene: Scene) -> bool:
        """The right number of things in the right arrangement, and the right one in each place."""
        return all(self.classes[kind] == labels(scene)[kind] for kind in ("layout", "first", "second"))


class Judge:
    """The evaluator, ready for use on pictures, uint8 `[128, 128, 3]` each."""

    def __init__(self, model: Evaluator, device: Device):
        self.model, self.device = model.eval(), device

    @classmethod
    def read(cls, checkpoint: Path, device: Device) -> Judge:
        return cls(read_averaged(Evaluator(), checkpoint).to(device.name, memory_format=torch.channels_last), device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Verdict]:
        verdicts = []
        for start in range(0, len(pictures), 64):
            features, logits = self.model(to_tensor(np.stack(pictures[start : start + 64]), self.device.name))
            numbers = {kind: values.argmax(dim=1).tolist() for kind, values in logits.items()}
            for i, feature in enumerate(features.cpu().numpy()):
                verdicts.append(Verdict({kind: CLASSES[kind][n[i]] for kind, n in numbers.items()}, feature))
        return verdicts
