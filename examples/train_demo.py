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
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import demo_data
import mlx.core as mx
import numpy as np
import torch
from torch import Tensor
from torch_training import TextFlow, autoencoder_loss, flow_loss, run

from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import load_module, parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL as MLXAutoencoderKL
from mlx_starflow.models.starflow import STARFlow as MLXSTARFlow
from mlx_starflow.models.t5 import T5Config
from mlx_starflow.models.t5 import T5Encoder as MLXT5Encoder
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.reference.autoencoder_kl import AutoencoderKL
from mlx_starflow.reference.sampling import sample
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.t5 import T5Encoder
from mlx_starflow.training.data.views import augmented_crops
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


def train_autoencoder(data: Path, out: Path, steps: int) -> AutoencoderKL:
    pictures = ImageFolder.read(data, size=128, splits=("train", "autoencoder"))
    weight = np.array([2.0 if row["split"] == "train" else 0.6 for row in pictures.rows])
    rng = np.random.default_rng(0)

    def batches(size: int = 16) -> Iterator[Tensor]:
        while True:
            chosen = rng.choice(len(pictures), size, p=weight / weight.sum())
            views = augmented_crops(pictures.images[chosen], SIZE, rng, zoom=0.15, shift=2)
            yield to_tensor(views)

    model = AutoencoderKL(PRESET.autoencoder_config()).to(memory_format=torch.channels_last)
    loss = partial(autoencoder_loss, model, kl_weight=1e-4, noise_std=NOISE)
    return run(
        model,
        lambda batch, progress: loss(batch),
        batches(),
        [{"params": model.parameters(), "lr": 1.5e-3}],
        out / "autoencoder.pt",
        steps=steps,
        ema=0.999,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float `[B, 3, H, W]` in -1..1."""
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


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


def train_flow(data: Path, out: Path, autoencoder: AutoencoderKL, steps: int, batch_size: int) -> tuple:
    pictures = ImageFolder.read(data, size=128, splits=("train",))
    held_out = ImageFolder.read(data, size=128, splits=("held_out",))
    views = encode(autoencoder, pictures, 0, PRESET.views)
    mean = views.mean(dim=(0, 1, 2, 3))
    std = views.std(dim=(0, 1, 2, 3))
    views = (views - mean) / std
    other = (encode(autoencoder, held_out, 1, 4) - mean) / std
    print(f"{len(pictures)} concepts, latents with mean {mean.tolist()} and std {std.tolist()}", flush=True)

    tokenizer = tokenizer_for(pictures, out)
    text_config = PRESET.text_config(tokenizer.vocab_size)
    torch.manual_seed(0)
    model = TextFlow(STARFlow(PRESET.flow_config()), T5Encoder(text_config))
    print({n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}, flush=True)
    rng = np.random.default_rng(0)
    favoured = np.array([any(row["subgroup"].startswith(name) for name in FAVOURED) for row in pictures.rows])
    weight = np.where(favoured, 3.0, 1.0)
    print(f"{favoured.sum()} concepts are favoured", flush=True)

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask, _ = tokenizer.batch(texts, TEXT_LENGTH)
        return torch.from_numpy(ids).long(), torch.from_numpy(mask)

    def batches() -> Iterator[tuple]:
        while True:
            chosen = rng.choice(len(pictures), batch_size, replace=False, p=weight / weight.sum())
            texts = [caption(pictures.captions[i], pictures.rows[i]["tags"], rng) for i in chosen]
            yield (views[chosen, rng.integers(PRESET.views, size=batch_size)], *tokens(texts))

    def loss(batch: tuple, progress: float) -> tuple:
        full = 0.5 if progress < 0.7 else max(0.1, 0.5 - 0.4 * (progress - 0.7) / 0.15)
        return flow_loss(model, *batch, noise_std=NOISE, full=full, partial=0.3)

    @torch.no_grad()
    def watch(averaged: TextFlow, step: int) -> str:
        """NLL on training and held-out pictures, and how often a sample's nearest latent has the right concept."""
        generator = torch.Generator().manual_seed(1)
        asked = torch.from_numpy(np.flatnonzero(favoured)[::4])
        report = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for name, latents, names in (("held-in", views, pictures), ("held-out", other, held_out)):
                chosen = torch.arange(len(names))[:: max(1, len(names) // 128)]
                text = averaged.text_encoder.encode(*tokens([names.captions[i][0] for i in chosen]))
                clean = latents[chosen, 0]
                noisy = clean + NOISE * torch.randn(clean.shape, generator=generator)
                report.append(f"{name} nll {averaged.flow(noisy, text).nll().mean():.4f}")
            text = averaged.text_encoder.encode(*tokens([pictures.captions[i][0] for i in asked]))
            z = 0.7 * torch.randn(len(asked), 16, 16, 4, generator=generator)
            samples = sample(averaged.flow, z, text.float())
        distance = torch.cdist(samples.flatten(1), views.flatten(0, 1).flatten(1))
        right = (distance.argmin(dim=1) // PRESET.views == asked).float().mean()
        return f"{report[0]}  {report[1]}  top-1 {right:.3f}"

    averaged = run(
        model,
        loss,
        batches(),
        model.groups(1.2e-3, 8.0),
        out / "flow.pt",
        steps=steps,
        ema=0.999,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        watch=watch,
    )
    return averaged, text_config, mean, std


def export(
    out: Path, autoencoder: AutoencoderKL, trained: TextFlow, text_config: T5Config, mean: Tensor, std: Tensor
) -> None:
    """Write the MLX model directory `out/model`: flow and text encoder in 8 bits, the autoencoder in bfloat16."""
    moments = {"latents_mean": tuple(mean.tolist()), "latents_std": tuple(std.tolist())}
    vae = MLXAutoencoderKL(replace(PRESET.autoencoder_config(), **moments))
    load_module(vae, vae.sanitize(arrays(autoencoder)), "autoencoder", dtype=mx.bfloat16)
    save_model(out / "model/vae", parameters(vae), vae.config.to_dict())

    encoder = load_module(MLXT5Encoder(text_config), arrays(trained.text_encoder), "text encoder", dtype=mx.bfloat16)
    quantization = quantize_module(encoder, "8", 64)
    config = {**text_config.to_dict(), "quantization": quantization}
    save_model(out / "model/text_encoder", parameters(encoder), config)
    shutil.copy(out / "spiece.model", out / "model/text_encoder/spiece.model")

    flow = load_module(MLXSTARFlow(PRESET.flow_config()), arrays(trained.flow), "flow", dtype=mx.bfloat16)
    quantization = quantize_module(flow, "8", 64)
    config = {
        "model_type": "starflow",
        **flow.config.to_dict(),
        "quantization": quantization,
        "pipeline": PRESET.pipeline,
    }
    save_model(out / "model", parameters(flow), config)


def arrays(module: torch.nn.Module) -> dict[str, mx.array]:
    return {name: mx.array(value.contiguous().numpy()) for name, value in module.state_dict().items()}


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
    export(args.out, autoencoder, *train_flow(args.data, args.out, autoencoder, args.flow_steps, args.batch_size))


if __name__ == "__main__":
    main()
