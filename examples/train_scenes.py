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
import time
from dataclasses import replace
from pathlib import Path

import torch
from scene_autoencoder import train_autoencoder
from scene_flow import Latents, tokenizer_for, train_flow
from scene_pictures import Renderer
from scene_recipe import PIPELINE, SCENES, TINY, Recipe, on_gpu
from torch import Tensor
from torch_loop import Device, TimeIsUp, read_averaged
from torch_training import TextFlow, write_model

from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.reference.autoencoder_kl import AutoencoderKL
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.t5 import T5Encoder


def export(recipe: Recipe, latents: Latents, tokenizer: Tokenizer, out: Path, dense: bool = False) -> None:
    """Write the MLX model directory `out/model` from the checkpoints; `out/dense`, not quantized, if it is `dense`."""
    flow, encoder = STARFlow(recipe.flow_config()), T5Encoder(recipe.text_config(tokenizer.vocab_size))
    trained = read_averaged(TextFlow(flow, encoder), out / "flow.pt")
    folder, spiece = out / ("dense" if dense else "model"), out / "spiece.model"
    write_model(folder, latents.autoencoder, trained, latents.mean, latents.std, spiece, PIPELINE, dense)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB", flush=True)


SHARD_BYTES = 15_000_000


def pack(out: Path, folder: Path) -> None:
    """The averaged weights in half precision, in a few files of under 16 MB each, to carry elsewhere."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Tensor]] = [{}]
    for part in (part for part in ("autoencoder", "flow") if (out / f"{part}.pt").is_file()):
        state = torch.load(out / f"{part}.pt", weights_only=True, map_location="cpu", mmap=True)
        for name, value in {**state["averaged"], "step": torch.tensor([state["step"]])}.items():
            value = value.to(torch.float16).contiguous() if value.is_floating_point() else value
            if sum(t.nbytes for t in files[-1].values()) + value.nbytes > SHARD_BYTES:
                files.append({})
            files[-1][f"{part}/{name}"] = value
    for index, tensors in enumerate(files):
        save_file(tensors, folder / "unfinished")
        (folder / "unfinished").rename(folder / f"weights-{index}.safetensors")


def unpack(folder: Path, out: Path) -> None:
    """The opposite of `pack`: checkpoints to export from, or to start from with a new optimizer."""
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
    parser.add_argument("--flow-minutes", type=float, help="train flow and text encoder for so long, not for steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long")
    parser.add_argument("--autoencoder-only", action="store_true", help="stop when the autoencoder is trained")
    parser.add_argument("--export", action="store_true", help="only write the model directory, from what there is")
    parser.add_argument("--dense", action="store_true", help="write OUT/dense, in float32, in place of OUT/model")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write the weights in files under 16 MB too")
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

    def saved() -> None:
        if args.pack:
            pack(args.out, args.pack)

    try:
        if args.export:
            autoencoder = read_averaged(AutoencoderKL(recipe.autoencoder_config()), args.out / "autoencoder.pt")
            autoencoder = autoencoder.to(device.name, memory_format=torch.channels_last)
        else:
            autoencoder = train_autoencoder(recipe, renderer, args.out, device, deadline)
            if args.autoencoder_only:
                return saved()
        latents = Latents(recipe, renderer, autoencoder, args.out / "latents", device)
        tokenizer = tokenizer_for(recipe, args.out / "spiece.model")
        if not args.export:
            seconds = args.flow_minutes and 60 * args.flow_minutes
            train_flow(recipe, latents, tokenizer, args.out, device, seconds, deadline, saved)
        export(recipe, latents, tokenizer, args.out, args.dense)
    except TimeIsUp as stopped:
        print(stopped, flush=True)


if __name__ == "__main__":
    main()
