"""Memory and time of the full-size 3B text-to-image model, with random weights, on this machine.

    python examples/reports/full_size_run.py SCRATCH --quantize 8
    python examples/reports/full_size_run.py SCRATCH --quantize 4

Writes a model directory of the released sizes into SCRATCH (flow, flan-t5-xl encoder, SD-VAE), opens it as any other is
opened, and prints, phase by phase, the seconds, the most memory that MLX held and what `mlx-starflow info`
predicts: a prompt's encoding, the first 16 tokens of the deep block with guidance, one forward pass of the whole flow
(the exact likelihood), and the decoding of one picture.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map

from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.directory import load_flow, load_text_encoder, load_vae
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.planning.memory import ModelConfigs, plan
from mlx_starflow.sampling import GuidedFlow, SamplingOptions, sequential
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.training.recipes.text import train_tokenizer

PROMPT = "a corgi in the snow"
GUIDANCE = 3.6
TOKENS = 16


def write_random_model(folder: Path, configs: ModelConfigs, how: str, guidance: float) -> None:
    """A model directory of these sizes; nothing of it is ever in memory as a whole."""
    mx.random.seed(0)
    networks = configs.networks()
    for network in networks.values():
        network.update(tree_map(lambda array: 0.02 * mx.random.normal(array.shape), network.parameters()))
    flow, encoder, autoencoder = networks["flow"], networks["text encoder"], networks["autoencoder"]
    save_model(folder / "vae", parameters(autoencoder), configs.vae.to_dict())
    settings = {"quantization": quantize_module(encoder, how)}
    save_model(folder / "text_encoder", parameters(encoder), {**configs.text_encoder.to_dict(), **settings})
    train_tokenizer([PROMPT, "a cat on a sofa", "the moon over a lake"] * 40, folder / "text_encoder/spiece.model", 60)
    settings = {"quantization": quantize_module(flow, how), "pipeline": {"guidance": guidance}}
    save_model(folder, parameters(flow), {"model_type": "starflow", **configs.flow.to_dict(), **settings})


def size_on_disk(folder: Path) -> int:
    """Bytes of a model directory's weights."""
    return sum(path.stat().st_size for path in folder.glob("**/*.safetensors"))


@contextmanager
def phase(what: str, expected: int) -> Iterator[None]:
    mx.clear_cache()
    mx.reset_peak_memory()
    began = time.perf_counter()
    yield
    seconds, peak = time.perf_counter() - began, mx.get_peak_memory() / 2**30
    print(f"{what:<44} {seconds:7.1f} s   peak {peak:6.2f} GiB   predicted {expected / 2**30:6.2f} GiB", flush=True)


def encode_prompt(folder: Path, prompt: str, length: int, expected: int) -> tuple[mx.array, mx.array]:
    """Embeddings `[1, length, D]` of a prompt and of the empty one."""
    with phase("text: prompt and empty prompt encoded", expected):
        encoder, tokenizer = load_text_encoder(folder / "text_encoder")
        ids, mask, _ = tokenizer.batch([prompt, ""], length)
        texts = encoder.encode(mx.array(ids), mx.array(mask))
        mx.eval(texts)
    return texts[:1], texts[1:]


def begin_sampling(
    folder: Path, z: mx.array, text: mx.array, null: mx.array, guidance: float, expected: int, kv_bits: KVBits = 0
) -> tuple[STARFlow, int]:
    """Load the flow and sample its first tokens: the flow, and the bytes of the deep block's KV cache."""
    with phase(f"flow: first {TOKENS} tokens of the deep block", expected):
        flow = load_flow(folder)
        guided = GuidedFlow(flow, z.shape, text, null, SamplingOptions(guidance, kv_bits=kv_bits))
        tokens = flow.noise_tokens(z)
        decoder = guided.decoder(len(flow.blocks) - 1, 1, tokens.shape[1])
        decoder.begin(tokens[:, :TOKENS])
        for _ in sequential.invert(decoder, 0, decoder.z.shape[1]):
            pass
        mx.eval(decoder.data(0, TOKENS))
    return flow, decoder.network.cache_bytes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder with 6 GB to spare")
    parser.add_argument("--quantize", default="8", help="as in `mlx-starflow convert`")
    parser.add_argument("--like", type=Path, help="a model directory whose sizes to take instead of the release's")
    args = parser.parse_args(arguments)
    print(f"machine: {platform.platform()}, MLX {mx.__version__} on the {mx.default_device().type.name}", flush=True)
    folder = args.scratch / f"model-{args.quantize}"
    configs = ModelConfigs.read(args.like) if args.like else ModelConfigs.of_release("apple/starflow")
    if not (folder / "config.json").exists():
        with phase(f"written with {args.quantize}-bit weights", 0):
            write_random_model(folder, configs, args.quantize, GUIDANCE)
    print(f"{size_on_disk(folder) / 1e9:.2f} GB of weights", flush=True)

    expected = plan(folder).phases(low_memory=True)
    text, null = encode_prompt(folder, PROMPT, configs.flow.txt_size, expected["text"])
    side = configs.flow.img_size
    z = mx.array(draw_noise([0], (side, side, configs.flow.channel_size)))
    flow, _ = begin_sampling(folder, z, text, null, GUIDANCE, expected["flow"])
    with phase("likelihood: one forward pass of the flow", expected["verify"]):
        nll = flow(z, text).nll()
        mx.eval(nll)
    print(f"likelihood finite: {bool(mx.isfinite(nll).all())}")
    del flow
    with phase("decode: one picture", expected["decode"]):
        vae = load_vae(folder / "vae")
        picture = vae.decode(vae.unscale(z))
        mx.eval(picture)
    print(f"picture of {picture.shape[2]}x{picture.shape[1]} pixels, finite: {bool(mx.isfinite(picture).all())}")


if __name__ == "__main__":
    main()
