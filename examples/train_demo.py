"""Train the embedded model from nothing: pictures, autoencoder, then flow and text encoder together, 8 bits.

    python examples/train_demo.py data/emoji runs/demo          # hours on two CPU cores; run again to resume
    mlx-starflow generate "a red apple" --model runs/demo/model

What data/emoji does not hold yet is fetched first (`demo_data.py`, with npm). Needs PyTorch (`pip install '.[torch]'`):
it trains the PyTorch reference of the network, which has the CPU's bfloat16 matrix units and vectorized maths
where MLX has not. The weights it writes are MLX model directories. In MLX, `mlx-starflow train data/emoji -o model
--preset demo` trains networks of the same sizes on the same pictures with a simpler recipe (no favoured concepts, tags
or articles): other weights, that nobody has trained to the end yet.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import demo_data
import numpy as np
import torch
from torch import Tensor
from torch_loop import Device, train
from torch_training import TextFlow, autoencoder_loss, flow_loss, to_tensor, tokens, write_model

from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.reference.autoencoder_kl import AutoencoderKL
from mlx_starflow.reference.sampling import sample
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.t5 import T5Encoder
from mlx_starflow.training.data.dropout import context_share
from mlx_starflow.training.data.views import augmented_crops
from mlx_starflow.training.loop.schedules import cosine
from mlx_starflow.training.recipes.presets import get_preset
from mlx_starflow.training.recipes.text import train_tokenizer

PRESET = get_preset("demo")
SIZE = PRESET.size
NOISE = PRESET.flow_training.noise_std
TEXT_LENGTH = PRESET.flow["txt_size"]

# Subgroups whose pictures a user is most likely to ask for: drawn three times as often as the rest.
FAVOURED = [
    "face-",
    "cat-face",
    "monkey-face",
    "heart",
    "animal-",
    "plant-",
    "food-",
    "drink",
    "transport-",
    "sky-weather",
    "sport",
    "musical-instrument",
    "event",
]


WARM_UP = 0.02
"""Share of the steps over which the learning rate rises."""


class Views:
    """Batches for the autoencoder: random views of pictures `[B, 3, H, W]`, those that the flow sees more often."""

    def __init__(self, pictures: ImageFolder, size: int = 16):
        self.pictures, self.size = pictures, size
        weight = np.array([2.0 if row["split"] == "train" else 0.6 for row in pictures.rows])
        self.share = weight / weight.sum()

    def __getitem__(self, step: int) -> Tensor:
        rng = np.random.default_rng([0, step])
        chosen = rng.choice(len(self.pictures), self.size, p=self.share)
        return to_tensor(augmented_crops(self.pictures.images[chosen], SIZE, rng, zoom=0.15, shift=2))


def train_autoencoder(data: Path, out: Path, steps: int) -> AutoencoderKL:
    model = AutoencoderKL(PRESET.autoencoder_config()).to(memory_format=torch.channels_last)
    loss = partial(autoencoder_loss, model, kl_weight=1e-4, noise_std=NOISE)
    return train(
        model,
        lambda batch, progress: loss(batch),
        Views(ImageFolder.read(data, size=128, splits=("train", "autoencoder"))),
        [{"params": list(model.parameters()), "lr": 1.5e-3}],
        out / "autoencoder.pt",
        Device("cpu"),
        steps=steps,
        schedule=lambda step, progress, warm_up: cosine(progress, WARM_UP),
    )


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: ImageFolder, seed: int, views: int) -> Tensor:
    """Latents (the posterior's mean) of `views` random views of each picture, `[N, views, 16, 16, 4]`."""
    rng = np.random.default_rng(seed)
    latents = []
    for _ in range(views):
        # Hardly varied: a token's Gaussian cannot be left and right at once, and blurs what it is shown both ways.
        crops = to_tensor(augmented_crops(pictures.images, SIZE, rng, zoom=0.04, shift=1, flip=False))
        latents.append(torch.cat([autoencoder.encode(part)[0] for part in crops.split(64)]).permute(0, 2, 3, 1))
    return torch.stack(latents, dim=1).contiguous()


def tokenizer_for(pictures: ImageFolder, out: Path) -> Tokenizer:
    """A tokenizer for the names, their articles and, seen less often, the tags."""
    words = [caption for captions in pictures.captions for caption in captions]
    tags = [tag for row in pictures.rows for tag in row["tags"]]
    phrases = [f"{article} {word}" for word in words for article in ("a", "an", "the")]
    return train_tokenizer(words * 3 + tags + phrases, out / "spiece.model", PRESET.vocab_size)


def caption(captions: list[str], tags: list[str], rng: np.random.Generator) -> str:
    """Mostly the usual name; sometimes another name, a tag or an article; one in ten is dropped for guidance."""
    draw = rng.random()
    if draw < 0.1:
        return ""
    if draw < 0.15 and tags:
        text = tags[rng.integers(len(tags))]
    elif draw < 0.55 and len(captions) > 1:
        text = captions[rng.integers(1, len(captions))]
    else:
        text = captions[0]
    if rng.random() < 0.3:
        article = "an" if text[:1] in "aeiou" else "a"
        text = f"{article if rng.random() < 0.7 else 'the'} {text}"
    return text


class Captioned:
    """Batches for the flow: latents of a random view, token ids and mask of a caption."""

    def __init__(self, pictures: ImageFolder, views: Tensor, tokenizer: Tokenizer, favoured: np.ndarray, size: int):
        self.pictures, self.views, self.tokenizer, self.size = pictures, views, tokenizer, size
        weight = np.where(favoured, 3.0, 1.0)
        self.share = weight / weight.sum()

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        rng, pictures = np.random.default_rng([1, step]), self.pictures
        chosen = rng.choice(len(pictures), self.size, replace=False, p=self.share)
        texts = [caption(pictures.captions[i], pictures.rows[i]["tags"], rng) for i in chosen]
        latents = self.views[chosen, rng.integers(PRESET.views, size=self.size)]
        return latents, *tokens(self.tokenizer, texts, TEXT_LENGTH)


def train_flow(
    data: Path, out: Path, autoencoder: AutoencoderKL, steps: int, batch_size: int
) -> tuple[TextFlow, Tensor, Tensor]:
    """The trained networks, and mean and standard deviation of the raw latents, a number a channel."""
    pictures = ImageFolder.read(data, size=128, splits=("train",))
    held_out = ImageFolder.read(data, size=128, splits=("held_out",))
    views = encode(autoencoder, pictures, 0, PRESET.views)
    mean = views.mean(dim=(0, 1, 2, 3))
    std = views.std(dim=(0, 1, 2, 3))
    views = (views - mean) / std
    other = (encode(autoencoder, held_out, 1, 4) - mean) / std
    print(f"{len(pictures)} concepts, latents with mean {mean.tolist()} and std {std.tolist()}", flush=True)

    tokenizer = tokenizer_for(pictures, out)
    torch.manual_seed(0)
    model = TextFlow(STARFlow(PRESET.flow_config()), T5Encoder(PRESET.text_config(tokenizer.vocab_size)))
    print({n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}, flush=True)
    favoured = np.array([any(row["subgroup"].startswith(name) for name in FAVOURED) for row in pictures.rows])
    print(f"{favoured.sum()} concepts are favoured", flush=True)

    def loss(batch: tuple, progress: float) -> tuple[Tensor, dict[str, float]]:
        return flow_loss(model, *batch, noise_std=NOISE, full=context_share(0.5, progress), partial=0.3)

    @torch.no_grad()
    def watch(averaged: TextFlow, step: int) -> str:
        """NLL on training and held-out pictures, and how often a sample's nearest latent has the right concept."""
        generator = torch.Generator().manual_seed(1)
        asked = torch.from_numpy(np.flatnonzero(favoured)[::4])
        report = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for name, latents, names in (("held-in", views, pictures), ("held-out", other, held_out)):
                chosen = torch.arange(len(names))[:: max(1, len(names) // 128)]
                text = averaged.text_encoder.encode(
                    *tokens(tokenizer, [names.captions[i][0] for i in chosen], TEXT_LENGTH)
                )
                clean = latents[chosen, 0]
                noisy = clean + NOISE * torch.randn(clean.shape, generator=generator)
                report.append(f"{name} nll {averaged.flow(noisy, text).nll().mean():.4f}")
            text = averaged.text_encoder.encode(
                *tokens(tokenizer, [pictures.captions[i][0] for i in asked], TEXT_LENGTH)
            )
            z = 0.7 * torch.randn(len(asked), 16, 16, 4, generator=generator)
            samples = sample(averaged.flow, z, text.float())
        distance = torch.cdist(samples.flatten(1), views.flatten(0, 1).flatten(1))
        right = (distance.argmin(dim=1) // PRESET.views == asked).float().mean()
        return f"{report[0]}  {report[1]}  top-1 {right:.3f}"

    averaged = train(
        model,
        loss,
        Captioned(pictures, views, tokenizer, favoured, batch_size),
        model.groups(1.2e-3, 8.0),
        out / "flow.pt",
        Device("cpu"),
        steps=steps,
        schedule=lambda step, progress, warm_up: cosine(progress, WARM_UP),
        watch=watch,
        watch_every=2000,
    )
    return averaged, mean, std


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the pictures, as demo_data.py writes it; fetched if missing")
    parser.add_argument("out", type=Path, help="folder for checkpoints and the finished model")
    parser.add_argument("--autoencoder-steps", type=int, default=PRESET.autoencoder_training.steps)
    parser.add_argument("--flow-steps", type=int, default=PRESET.flow_training.steps)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(arguments)
    if not (args.data / "metadata.jsonl").is_file():
        demo_data.main([str(args.data)])
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    autoencoder = train_autoencoder(args.data, args.out, args.autoencoder_steps)
    model, mean, std = train_flow(args.data, args.out, autoencoder, args.flow_steps, args.batch_size)
    write_model(args.out / "model", autoencoder, model, mean, std, args.out / "spiece.model", PRESET.pipeline)


if __name__ == "__main__":
    main()
