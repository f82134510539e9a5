"""Train the embedded model from nothing, by one command; run it again to resume.

    python examples/train_scenes.py data/scenes runs/scenes
    mlx-starflow generate "a fox to the left of a cactus at night" --model runs/scenes/model

The scenes are drawn by program (`scene_data.py`) while the networks learn: first an autoencoder, 128x128 -> 16x16x4,
whose decoder reads latents as noisy as the flow's; then a T5-style text encoder and the flow together. Needs PyTorch
(`pip install '.[torch]'`): it trains the PyTorch reference of the networks, on a GPU if there is one (bfloat16,
compiled), else on the CPU, and writes an MLX model directory in 8 bits. Checkpoints are at most two minutes apart;
`--minutes` stops in time, `--tiny` is a rehearsal in seconds. Finished parts are skipped by the next run.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scene_data import Sample, Stream, sheet
from scene_loop import Device, TimeIsUp, read_averaged, train
from scene_pictures import Renderer
from torch import Tensor, nn

from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Config
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.reference.autoencoder_kl import AutoencoderKL
from mlx_starflow.reference.sampling import denoise, sample
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.t5 import T5Encoder
from mlx_starflow.reference.training import TextFlow, flow_loss
from mlx_starflow.training.recipes.text import train_tokenizer

NOISE = 0.3
TEXT_LENGTH = 24
NOT_TRAINED_ON = 10**9
"""Samples of the training stream from this number on are for looking at, not for training."""

PROMPTS = [
    *["a fox", "a red apple on a blue background", "a big penguin in the snow", "three donuts on a table"],
    *["a cat to the left of a dog", "a rocket above a moon at night", "two fish under water", "a small house on grass"],
    *["a robot and a sunflower on a yellow background", "an umbrella in the rain", "a car below a rainbow"],
    "a guitar at sunset",
]


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths. Latents are made in shards of `shard` scenes, `shards` in all, one more every `grow` steps."""

    autoencoder: dict
    text: dict
    flow: dict
    autoencoder_steps: int
    autoencoder_batch: int
    flow_steps: int
    flow_batch: int
    flow_lr: float
    shards: int = 48
    shard: int = 5000
    grow: int = 400
    vocabulary: int = 1200

    def autoencoder_config(self) -> AutoencoderKLConfig:
        plain = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.0, "sample_size": 128}
        return AutoencoderKLConfig.from_dict({**plain, **self.autoencoder})

    def text_config(self, vocabulary: int) -> T5Config:
        return T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", d_kv=64, **self.text)

    def flow_config(self) -> FlowConfig:
        return FlowConfig(
            img_size=16,
            channel_size=4,
            head_dim=64,
            txt_size=TEXT_LENGTH,
            txt_dim=self.text["d_model"],
            noise_std=NOISE,
            use_softplus=True,
            use_final_norm=True,
            use_qk_norm=True,
            norm_type="rms_norm",
            soft_clip=4.0,
            **self.flow,
        )


SCENES = Recipe(
    autoencoder={"block_out_channels": [24, 48, 96, 192], "layers_per_block": 1, "norm_num_groups": 8},
    text={"d_model": 256, "d_ff": 640, "num_layers": 3, "num_heads": 4},
    flow={"patch_size": 2, "channels": 256, "top_block_channels": 384, "layers_per_block": [2, 2, 6]},
    autoencoder_steps=10_000,
    autoencoder_batch=8,
    flow_steps=40_000,
    flow_batch=32,
    flow_lr=1e-3,
)

TINY = Recipe(
    autoencoder={"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
    text={"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 1},
    flow={"patch_size": 4, "channels": 64, "layers_per_block": [1, 2]},
    autoencoder_steps=3,
    autoencoder_batch=2,
    flow_steps=4,
    flow_batch=4,
    flow_lr=1e-3,
    shards=2,
    shard=8,
    grow=2,
    vocabulary=400,
)


def on_gpu(recipe: Recipe) -> Recipe:
    """The same networks with what a GPU does in minutes: larger batches, every latent made before the flow starts."""
    return replace(
        recipe, autoencoder_steps=6000, autoencoder_batch=64, flow_steps=16_000, flow_batch=256, flow_lr=1.5e-3, grow=0
    )


# -------------------------------------------------------------------------------------------------- autoencoder


class Pictures:
    """Batches for the autoencoder, uint8 `[B, 128, 128, 3]`: mostly scenes, also any emoji anywhere, half mirrored."""

    def __init__(self, renderer: Renderer, size: int, seed: int = 1):
        self.stream, self.size, self.seed = Stream(renderer, seed), size, seed

    def __getitem__(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step])
        pictures = []
        for i in range(self.size):
            if rng.random() < 0.25:
                picture = self.stream.renderer.render_any(rng)
            else:
                picture = self.stream[step * self.size + i].picture
            pictures.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
        return torch.from_numpy(np.stack(pictures))


def to_tensor(pictures: Tensor | np.ndarray, device: Device) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float `[B, 3, H, W]` in -1..1, channels last in memory."""
    pictures = torch.as_tensor(pictures).to(device.name, non_blocking=True)
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_pictures(decoded: Tensor) -> np.ndarray:
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def autoencoder_loss(model: AutoencoderKL, pictures: Tensor, device: Device) -> tuple[Tensor, dict[str, float]]:
    """L1 and a little L2 of pictures `[B, 3, H, W]` and of their edges, through noisy latents; plus a small KL term.

    The noise is the flow's, in units of each channel's spread, for half of the batch, and less for the other half: what
    the flow makes is cleaned by a score step.
    """
    with device.autocast():
        mean, logvar = model.encode(pictures)
    mean, logvar = mean.float(), logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    level = torch.full((len(mean), 1, 1, 1), NOISE, device=mean.device)
    level[::2] *= torch.rand(len(level[::2]), 1, 1, 1, device=mean.device)
    spread = mean.std(dim=(0, 2, 3), keepdim=True)
    deviation = (logvar.exp() + (level * spread) ** 2).sqrt()
    with device.autocast():
        decoded = model.decode(mean + deviation * torch.randn_like(mean))
    decoded = decoded.float()
    absolute, squared = (decoded - pictures).abs().mean(), (decoded - pictures).square().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(pictures), strict=True))
    loss = absolute + 0.5 * squared + 0.5 * edge + 1e-4 * kl
    return loss, {
        "L1": absolute.item(),
        "dB": 10 * math.log10(4 / squared.item()),
        "edge": edge.item(),
        "kl": kl.item(),
    }


def train_autoencoder(recipe: Recipe, renderer: Renderer, out: Path, device: Device, deadline: float) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(recipe.autoencoder_config()).to(device.name, memory_format=torch.channels_last)
    device.compile(model.encoder, model.decoder)
    shown = [Stream(renderer, 2, kind)[n] for kind in ("train", "object") for n in range(12)]

    @torch.no_grad()
    def watch(averaged: AutoencoderKL, step: int) -> str:
        clean = to_tensor(np.stack([s.picture for s in shown]), device)
        with device.autocast():
            mean = averaged.encode(clean)[0].float()
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean.device)
            noisy = mean + NOISE * mean.std(dim=(0, 2, 3), keepdim=True) * noise
            decoded = [averaged.decode(latents).float().clamp(-1, 1) for latents in (mean, noisy)]
        drawn = [np.concatenate(trio) for trio in zip(*map(to_pictures, (clean, *decoded)), strict=True)]
        (out / "autoencoder").mkdir(exist_ok=True)
        show(drawn, out / "autoencoder" / f"{step:06d}.png", 12)
        report = []
        for name, part in (("trained objects", slice(0, 12)), ("held-out objects", slice(12, 24))):
            errors = [10 * math.log10(4 / (x[part] - clean[part]).square().mean().item()) for x in decoded]
            report.append(f"{name}: {errors[0]:.2f} dB clean, {errors[1]:.2f} dB noisy")
        return "; ".join(report)

    return train(
        model,
        lambda batch, progress: autoencoder_loss(model, to_tensor(batch, device), device),
        Pictures(renderer, recipe.autoencoder_batch),
        [{"params": list(model.parameters()), "lr": 1.2e-3}],
        out / "autoencoder.pt",
        device,
        steps=recipe.autoencoder_steps,
        deadline=deadline,
        watch=watch,
        watch_every=500,
    )


def show(pictures: list[np.ndarray], path: Path, columns: int) -> None:
    from PIL import Image

    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


# ------------------------------------------------------------------------------------------------------ latents


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
                mean = self.autoencoder.encode(to_tensor(pictures[start : start + 50], self.device))[0]
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
                encoded = [self.encode(part) for part in self._pictures(numbers)]
                with open(path.with_suffix(".unfinished"), "wb") as file:
                    np.save(file, np.concatenate(encoded).astype(np.float16))
                os.replace(path.with_suffix(".unfinished"), path)
                print(f"latents of scenes {numbers.start} to {numbers.stop - 1}", flush=True)
            self.shards.append(np.load(path))

    def _pictures(self, numbers: range) -> list[np.ndarray]:
        stream = Stream(self.renderer)
        parts = [numbers[i : i + 100] for i in range(0, len(numbers), 100)]
        if not self.device.workers:
            return (np.stack([stream[n].picture for n in part]) for part in parts)
        with multiprocessing.get_context("fork").Pool(self.device.workers) as pool:
            return pool.map(_Render(stream), parts)

    def __getitem__(self, numbers: np.ndarray) -> Tensor:
        """Normalized latents of scenes of the stream, by number."""
        raw = np.stack([self.shards[n // self.recipe.shard][n % self.recipe.shard] for n in numbers])
        return torch.from_numpy((raw.astype(np.float32) - self.mean) / self.std)


@dataclass(frozen=True)
class _Render:
    stream: Stream

    def __call__(self, numbers: range) -> np.ndarray:
        return np.stack([self.stream[n].picture for n in numbers])


# -------------------------------------------------------------------------------------------------- flow and text


def tokenizer_for(recipe: Recipe, path: Path) -> Tokenizer:
    """A tokenizer for captions; held-out objects are in it, so that no word of theirs falls to pieces."""
    captions = [
        Stream(None, 3, kind)[n].caption for kind, most in (("train", 16_000), ("object", 4000)) for n in range(most)
    ]
    return train_tokenizer(captions, path, recipe.vocabulary)


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
        return self.latents[numbers], *tokens(self.tokenizer, texts)


def tokens(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    ids, mask, _ = tokenizer.batch(texts, TEXT_LENGTH)
    return torch.from_numpy(ids).long(), torch.from_numpy(mask)


def share_of_text_alone(progress: float) -> float:
    """How much of a batch reads the text and no tokens: half of it, and less towards the end (see `context_keep`)."""
    return 0.5 if progress < 0.7 else max(0.1, 0.5 - 0.4 * (progress - 0.7) / 0.15)


def train_flow(
    recipe: Recipe, latents: Latents, tokenizer: Tokenizer, out: Path, device: Device, deadline: float
) -> TextFlow:
    torch.manual_seed(0)
    text_config = recipe.text_config(tokenizer.vocab_size)
    model = TextFlow(STARFlow(recipe.flow_config()), T5Encoder(text_config)).to(device.name)
    print({name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}, flush=True)
    device.compile(model.flow, model.text_encoder)

    def loss(batch: tuple, progress: float) -> tuple[Tensor, dict[str, float]]:
        full = share_of_text_alone(progress)
        batch = [part.to(device.name, non_blocking=True) for part in batch]
        value, numbers = flow_loss(model, *batch, noise_std=NOISE, full=full, partial=0.3)
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
                text = averaged.text_encoder.encode(*(t.to(device.name) for t in tokens(tokenizer, captions)))
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
        deadline=deadline,
        watch=watch,
    )


def draw(model: TextFlow, latents: Latents, tokenizer: Tokenizer, prompts: list[str], device: Device) -> np.ndarray:
    """Pictures of prompts, uint8, with the guidance and temperature of the model directory."""
    text, null = (
        model.text_encoder.encode(*(t.to(device.name) for t in tokens(tokenizer, texts))).float().detach()
        for texts in (prompts, [""])
    )
    z = PIPELINE["temperature"] * torch.randn(len(prompts), 16, 16, 4, generator=torch.Generator().manual_seed(1))
    with torch.enable_grad():
        x = denoise(model.flow, sample(model.flow, z.to(device.name), text, null, PIPELINE["guidance"]), text)
    raw = x.cpu().numpy() * latents.std + latents.mean
    with torch.no_grad(), device.autocast():
        return to_pictures(latents.autoencoder.decode(torch.from_numpy(raw).permute(0, 3, 1, 2).to(device.name)))


# --------------------------------------------------------------------------------------------------- model directory

PIPELINE = {"guidance": 1.0, "temperature": 0.7}


def export(recipe: Recipe, latents: Latents, tokenizer: Tokenizer, out: Path) -> None:
    """Write the MLX model directory `out/model` from the checkpoints: flow and text encoder in 8 bits, the
    autoencoder in bfloat16."""
    import mlx.core as mx

    from mlx_starflow.model_dir.quantization import quantize_module
    from mlx_starflow.model_dir.saving import save_model
    from mlx_starflow.model_dir.weights import load_module, parameters
    from mlx_starflow.models.autoencoder_kl import AutoencoderKL as MLXAutoencoderKL
    from mlx_starflow.models.starflow import STARFlow as MLXSTARFlow
    from mlx_starflow.models.t5 import T5Encoder as MLXT5Encoder

    def arrays(module: nn.Module) -> dict[str, mx.array]:
        return {name: mx.array(value.cpu().contiguous().numpy()) for name, value in module.state_dict().items()}

    text_config = recipe.text_config(tokenizer.vocab_size)
    trained = read_averaged(TextFlow(STARFlow(recipe.flow_config()), T5Encoder(text_config)), out / "flow.pt")
    moments = {"latents_mean": tuple(latents.mean.tolist()), "latents_std": tuple(latents.std.tolist())}
    vae = MLXAutoencoderKL(replace(recipe.autoencoder_config(), **moments))
    load_module(vae, vae.sanitize(arrays(latents.autoencoder)), "autoencoder", dtype=mx.bfloat16)
    save_model(out / "model/vae", parameters(vae), vae.config.to_dict())

    encoder = load_module(MLXT5Encoder(text_config), arrays(trained.text_encoder), "text encoder", dtype=mx.bfloat16)
    config = {**text_config.to_dict(), "quantization": quantize_module(encoder, "8", 64)}
    save_model(out / "model/text_encoder", parameters(encoder), config)
    shutil.copy(out / "spiece.model", out / "model/text_encoder/spiece.model")

    flow = load_module(MLXSTARFlow(recipe.flow_config()), arrays(trained.flow), "flow", dtype=mx.bfloat16)
    quantization = quantize_module(flow, "8", 64)
    config = {"model_type": "starflow", **flow.config.to_dict(), "quantization": quantization, "pipeline": PIPELINE}
    save_model(out / "model", parameters(flow), config)
    size = sum(file.stat().st_size for file in (out / "model").rglob("*") if file.is_file())
    print(f"{out / 'model'}: {size / 1e6:.1f} MB", flush=True)


SHARD_BYTES = 15_000_000


def pack(out: Path, folder: Path) -> None:
    """Both networks' averaged weights in half precision, in a few files of under 16 MB each, to carry elsewhere."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Tensor]] = [{}]
    for part in ("autoencoder", "flow"):
        if not (out / f"{part}.pt").is_file():
            continue
        state = torch.load(out / f"{part}.pt", weights_only=True, map_location="cpu", mmap=True)
        for name, value in {**state["averaged"], "step": torch.tensor([state["step"]])}.items():
            value = value.to(torch.float16).contiguous() if value.is_floating_point() else value
            if sum(t.nbytes for t in files[-1].values()) + value.nbytes > SHARD_BYTES:
                files.append({})
            files[-1][f"{part}/{name}"] = value
    for index, tensors in enumerate(files):
        save_file(tensors, folder / f"weights-{index}.safetensors")


def unpack(folder: Path, out: Path) -> None:
    """The opposite of `pack`: checkpoints to export from and to draw with, not to train on from."""
    from safetensors.torch import load_file

    tensors = {name: value for path in sorted(folder.glob("weights-*")) for name, value in load_file(path).items()}
    for part in ("autoencoder", "flow"):
        state = {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}
        if state:
            step = int(state.pop("step"))
            torch.save({"averaged": {n: v.float() for n, v in state.items()}, "step": step}, out / f"{part}.pt")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sprites, as scene_data.py writes it; fetched if missing")
    parser.add_argument("out", type=Path, help="folder for checkpoints, sheets of samples and the finished model")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and a few steps, to try the script")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, where there is no GPU")
    parser.add_argument("--autoencoder-steps", type=int)
    parser.add_argument("--flow-steps", type=int)
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long")
    parser.add_argument("--export", action="store_true", help="only write the model directory, from what there is")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="at the end write the weights in files under 16 MB")
    parser.add_argument(
        "--unpack", type=Path, metavar="DIR", help="start from weights that --pack wrote; with --export"
    )
    args = parser.parse_args(arguments)
    deadline = time.time() + 60 * args.minutes
    device = Device.choose(args.threads)
    recipe = TINY if args.tiny else on_gpu(SCENES) if device.is_cuda else SCENES
    steps = {"autoencoder_steps": args.autoencoder_steps, "flow_steps": args.flow_steps}
    recipe = replace(recipe, **{name: value for name, value in steps.items() if value is not None})
    args.out.mkdir(parents=True, exist_ok=True)
    if args.unpack:
        unpack(args.unpack, args.out)
    renderer = Renderer(args.data)
    try:
        if args.export:
            autoencoder = read_averaged(AutoencoderKL(recipe.autoencoder_config()), args.out / "autoencoder.pt")
            autoencoder = autoencoder.to(device.name, memory_format=torch.channels_last)
        else:
            autoencoder = train_autoencoder(recipe, renderer, args.out, device, deadline)
        latents = Latents(recipe, renderer, autoencoder, args.out / "latents", device)
        tokenizer = tokenizer_for(recipe, args.out / "spiece.model")
        if not args.export:
            train_flow(recipe, latents, tokenizer, args.out, device, deadline)
        export(recipe, latents, tokenizer, args.out)
    except TimeIsUp as stopped:
        print(stopped, flush=True)
    finally:
        if args.pack:
            pack(args.out, args.pack)


if __name__ == "__main__":
    main()
