"""Whatever takes long bounds what MLX keeps of freed buffers, gives them back, and leaves limits as they were."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.images import smooth_images, write_images
from helpers.metal import OWN, Metal
from helpers.model_directories import write_class_model, write_image_model, write_video_model
from helpers.upscalers import srvgg_tensors, write_upscaler

from mlx_starflow.media.videos import VideoWriter

own_array = np.array

COMMANDS = {
    "generate": "generate CAT -m IMAGE -o o.png --verify",
    "best of": "generate CAT -m IMAGE -o o.png --best-of 2",
    "classes": "generate 1 -m CLASS -o o.png",
    "video": "video CAT -m VIDEO -o o.webp --frames 9 --verify",
    "stream": "video CAT -m VIDEO -o o --frames 9 --stream",
    "score": "score pictures -m IMAGE --captions",
    "score video": "score a.webp -m VIDEO --draws 2",
    "classify": "classify pictures/0.png -m IMAGE --labels CAT,DOG",
    "calibrate": "calibrate pictures -m IMAGE --draws 2",
    "inpaint": "edit inpaint pictures/0.png --mask 4,0,4,8 -m IMAGE --steps 2 --rounds 2 -o o.png",
    "reprompt": "edit reprompt pictures/0.png --from CAT --to DOG -m IMAGE -o o.png",
    "vary": "edit vary pictures/0.png -m IMAGE -o o.png",
    "interpolate": "edit interpolate pictures/0.png pictures/1.png -m IMAGE --frames 3 -o o.png",
    "encode": "encode a.webp -m VIDEO -o n.safetensors",
    "decode": "decode a.safetensors -m VIDEO -o o.webp",
    "tune": "tune IMAGE --tolerance 0.02",
    "evaluate": "evaluate CLASS --data pictures --count 24 --likelihood 4 --draws 2 --features own",
    "cache": "cache pictures -o cache -m IMAGE",
    "train": "train pictures -o out --init IMAGE --steps 2 --batch-size 2",
    "finetune": "finetune pictures -m IMAGE -o run --lora 2 --steps 2 --batch-size 2",
    "distill": "distill IMAGE --prompt-file p.txt -o out --steps 2 --pairs 128 --channels 64 --batch-size 4",
    "upscale": "upscale pictures/0.png -o o.png --upscale-model x4.pth",
    "upscale video": "upscale a.webp -o o.webp --upscale-model x4.pth",
}


ELSEWHERE = {
    # Networks that are read, or drawn.
    "mlx_starflow.convert.upscalers",
    "mlx_starflow.model_dir.fingerprint",
    "mlx_starflow.model_dir.weights",
    "mlx_starflow.training.finetuning.finetune",
    "mlx_starflow.training.loop.checkpoint",
    "mlx_starflow.training.recipes.student",
    # Arrays that have been computed, and go on to NumPy.
    "mlx_starflow.editing.paths",
    "mlx_starflow.pipelines.base",
    "mlx_starflow.training.finetuning.data",
}
"""What evaluates arrays that no limits need to hold for."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "IMAGE": write_image_model(folder / "image"),
        "VIDEO": write_video_model(folder / "video"),
        "CLASS": write_class_model(folder / "class"),
    }


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-torch"))


@pytest.mark.parametrize("words", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command(words, models, here, monkeypatch, uncompiled):
    rows = [{"text": str(n % 3), "split": "validation" if n % 3 == 2 else "train"} for n in range(66)]
    write_images(Path("pictures"), smooth_images(66), rows)
    Path("p.txt").write_text("a cat\n")
    write_upscaler(Path("x4.pth"), srvgg_tensors())
    with VideoWriter(Path("a.webp"), 16) as writer:
        for frame in smooth_images(9, (48, 32)):
            writer.add(frame)
    name, *arguments = words.split()
    arguments = [models.get(word, {"CAT": "a cat", "DOG": "a dog"}.get(word, word)) for word in arguments]
    if name == "decode":
        assert Command("encode")("a.webp", "-m", models["VIDEO"], "-o", "a.safetensors").exit_code == 0
    metal, evaluated = Metal(monkeypatch), {True: set(), False: set()}

    def watched(evaluate):
        def call(*values, **options):
            if evaluate is not own_array or isinstance(values[0], mx.array):
                evaluated[metal.bounds].add(sys._getframe(1).f_globals["__name__"])
            return evaluate(*values, **options)

        return call

    for module, kind in ((mx, "eval"), (mx, "async_eval"), (np, "array")):
        monkeypatch.setattr(module, kind, watched(getattr(module, kind)))
    result = Command(name)(*arguments)
    assert result.exit_code == 0, result.output
    assert metal.limits == OWN and metal.given_back
    assert evaluated[True]
    assert evaluated[False] <= ELSEWHERE
