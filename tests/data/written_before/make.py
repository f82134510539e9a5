"""Writes the files of this folder with the mlx-starflow that is installed; see README.md."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import sentencepiece
import yaml
from mlx.utils import tree_flatten
from PIL import Image

from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.saving import save_model

FLOW = {
    "img_size": 4,
    "channel_size": 4,
    "patch_size": 1,
    "channels": 64,
    "layers_per_block": [1, 2],
    "txt_size": 12,
    "txt_dim": 64,
    "use_softplus": True,
    "soft_clip": 4.0,
    "noise_std": 0.1,
}
VIDEO = {
    "img_size": 2,
    "channel_size": 4,
    "patch_size": 1,
    "channels": 32,
    "top_block_channels": 32,
    "layers_per_block": [1, 1],
    "head_dim": 16,
    "vid_size": "9:16",
    "fps_cond": True,
    "noise_std": 0.5,
    "txt_size": 24,
    "txt_dim": 64,
    "cfg": 1.5,
    "use_softplus": True,
    "soft_clip": 4.0,
    "use_final_norm": True,
    "temporal_causal": 2,
    "shallow_block_local": True,
    "learnable_self_denoiser": True,
    "conditional_denoiser": True,
    "denoiser_window": 2,
}
TRAINED = {
    "channels": 16,
    "layers_per_block": [1, 1],
    "head_dim": 16,
    "patch_size": 2,
    "use_softplus": True,
    "soft_clip": 4.0,
}


def run(*words):
    print("mlx-starflow", *words, flush=True)
    subprocess.run([sys.executable, "-m", "mlx_starflow", *map(str, words)], check=True)


def write_model(folder, flow, vae, dtype, pipeline=None):
    mx.random.seed(0)
    for block in flow.blocks:
        block.proj_out.weight = 0.05 * mx.random.normal(block.proj_out.weight.shape)
    encoder = T5Encoder(T5Config(vocab_size=30, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))
    for network in (flow, vae, encoder):
        network.set_dtype(dtype)
    config = {"model_type": "starflow", **flow.config.to_dict(), **({"pipeline": pipeline} if pipeline else {})}
    save_model(folder, dict(tree_flatten(flow.parameters())), config)
    save_model(folder / "vae", dict(tree_flatten(vae.parameters())), vae.config.to_dict())
    save_model(folder / "text_encoder", dict(tree_flatten(encoder.parameters())), encoder.config.to_dict())
    # The usual normalization alone would take 240 KB.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red square", "a blue green square", "a black cat", "white waves at a yellow beach"]),
        vocab_size=30,
        model_prefix=str(folder / "text_encoder/spiece"),
        model_type="unigram",
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (folder / "text_encoder/spiece.vocab").unlink()


def main():
    mx.random.seed(4)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    write_model(Path("dense"), STARFlow(FlowConfig(**FLOW)), vae, mx.float32, {"guidance": 1.0, "temperature": 0.8})
    wan = AutoencoderWan(
        AutoencoderWanConfig(
            latents_mean=(0.1,) * 4, latents_std=(1.5,) * 4, base_dim=2, decoder_base_dim=2, z_dim=4, num_res_blocks=1
        )
    )
    flow = STARFlow(FlowConfig(**VIDEO))
    out = flow.learnable_self_denoiser.proj_out
    out.weight = 0.05 * mx.random.normal(out.weight.shape)
    write_model(Path("video-model"), flow, wan, mx.bfloat16)
    pictures = Path("pictures")
    pictures.mkdir()
    lines = []
    for index, name in enumerate(["red", "green", "blue", "black", "yellow", "white"]):
        coarse = np.random.default_rng(index).integers(0, 256, (3, 3, 3), np.uint8)
        Image.fromarray(coarse).resize((10, 12), Image.Resampling.BICUBIC).save(pictures / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a {name} square"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    run("quantize", "dense", "-o", "model", "--quantize", "mixed", "--text-encoder", "8")
    run("tune", "model")
    run("calibrate", pictures, "-m", "model", "--draws", "2")
    run(
        "generate",
        "a red square",
        "-m",
        "model",
        "--seed",
        "3",
        "--save-noise",
        "noise.safetensors",
        "-o",
        "picture.png",
    )
    run(
        "generate",
        "a cat",
        "a red square",
        "-m",
        "model",
        "--seed",
        "5",
        "-n",
        "2",
        "-o",
        "grid.png",
        "--method",
        "jacobi",
    )
    run("encode", "picture.png", "-p", "a red square", "-m", "model", "-o", "encoded.safetensors")
    run("decode", "encoded.safetensors", "-o", "decoded.png", "-m", "model")
    for suffix in ("gif", "webp", "mp4"):
        run(
            "video",
            "waves",
            "-m",
            "video-model",
            "--seed",
            "2",
            "--frames",
            "5",
            "--size",
            "32x32",
            "-o",
            f"video.{suffix}",
        )
    run("cache", pictures, "-o", "cache", "--model", "model", "--views", "2", "--flip")
    Path("flow.yaml").write_text(yaml.safe_dump(TRAINED))
    words = [
        "--model-config",
        "flow.yaml",
        "--encoders",
        "model",
        "--validation",
        "0.2",
        "--steps",
        "4",
        "--batch-size",
        "2",
    ]
    run("train", "cache", "-o", "train", *words, "--log-every", "1", "--save-steps", "2")
    words = ["--lora", "2", "--lr", "0.05", "--steps", "4", "--batch-size", "2", "--validation", "0.4", "--draws", "1"]
    run(
        "finetune",
        "model",
        "cache",
        "-o",
        "finetune",
        *words,
        "--samples",
        "2",
        "--log-every",
        "1",
        "--save-seconds",
        "1e-6",
    )
    # As if both trainings had been stopped before their last step; what they would have given is kept beside them.
    Path("train/training/flow/checkpoint-00000004.safetensors").unlink()
    for path in Path("train").iterdir():
        if path.name != "training":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy("finetune/checkpoints/log.jsonl", "finetune.jsonl")
    shutil.copy("train/training/flow/log.jsonl", "train.jsonl")
    Path("train/training/flow/best.safetensors").unlink()
    Path("finetune/checkpoints/checkpoint-00000004.safetensors").unlink()
    Path("finetune/adapter").rename("adapter")
    run("generate", "a red square", "-m", "model", "--lora", "adapter", "1", "--seed", "3", "-o", "adapted.png")
    for name in ("grid.png", "report.json"):
        Path("finetune", name).unlink()
    shutil.rmtree("dense")


main()
