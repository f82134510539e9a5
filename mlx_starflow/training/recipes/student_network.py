"""A new student of a flow: its config, the scales of its heads, and what it makes beside its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.student import MATCHING, Student, StudentConfig
from mlx_starflow.pipelines.class_labels import ClassPipeline
from mlx_starflow.pipelines.image import ImagePipeline
from mlx_starflow.sampling.student import sample_student
from mlx_starflow.training.data.pairs.files import SHARD, PairFolder
from mlx_starflow.training.loop.watch import SampleSheet


def student_config(
    pipe: ImagePipeline | ClassPipeline,
    kind: str,
    scales: Sequence[float],
    grid: tuple[int, int],
    *,
    guidance: float,
    temperature: float,
    channels: int | None = None,
    layers: int | None = None,
) -> StudentConfig:
    """The config of a student of a model's flow.

    Args:
        pipe: the teacher.
        kind: "inverse" or "matching".
        scales: see `student_scales`.
        grid: rows and columns of an image's tokens.
        guidance, temperature: of the samples that it learns from.
        channels, layers: None: the width of the flow's widest block, and half of all its layers.

    Raises:
        StarflowError: the sizes do not fit together.
    """
    config = pipe.model.flow.config
    blocks = [block.config for block in pipe.flow.blocks if not block.is_identity]
    widest = max(blocks, key=lambda block: block.channels)
    channels, head_dim = channels or widest.channels, widest.head_dim
    if channels % head_dim:
        raise StarflowError(f"a student's channels must be a multiple of {head_dim}, not {channels}")
    side, txt_dim, classes, reads_text = grid[0], 0, 0, isinstance(config, FlowConfig)
    if isinstance(config, FlowConfig):
        side, txt_dim = config.pt_seq_len or side, config.txt_dim if config.txt_size else 0
    else:
        classes = config.num_classes
    return StudentConfig(
        channels=channels,
        num_layers=layers or max(sum(block.num_layers for block in blocks) // 2, 1),
        head_dim=head_dim,
        num_heads=channels // head_dim,
        num_kv_heads=channels // head_dim,
        norm_type="rms_norm",
        use_qk_norm=True,
        kind=kind,
        teacher=fingerprint(pipe.directory),
        layout="starflow" if reads_text else "tarflow",
        channel_size=config.channel_size,
        patch_size=config.patch_size,
        side=side,
        scales=tuple(scales),
        txt_dim=txt_dim,
        num_classes=classes,
        positions=0 if reads_text else grid[0] * grid[1],
        guidance=guidance,
        temperature=temperature,
    )


def student_scales(folder: PairFolder, kind: str, fresh: float | None = None, seed: int = 0) -> list[float]:
    """Standard deviations of what a student's heads predict, over the first pairs.

    fresh: of the noise that a matching student learns from in the place of the pairs'; None: of theirs.
    """
    first = folder.read(np.arange(SHARD))
    if kind == MATCHING:
        noise = first["noise"]
        if fresh is not None:
            noise = fresh * np.random.default_rng(seed).standard_normal(noise.shape)
        return [float((first["clean"] - noise).std())]
    states = first["states"]
    return [*(float(states[:, number].std()) for number in range(states.shape[1])), float(first["clean"].std())]


def student_sheet(pipe: ImagePipeline | ClassPipeline, student: Student, pairs: dict[str, np.ndarray]) -> SampleSheet:
    """What the teacher and what the student makes of the noise of some pairs, side by side."""
    count, config = len(pairs["noise"]), pipe.model.flow.config
    latents = (count, config.img_size, config.img_size, config.channel_size)
    z = pipe.flow.token_noise(mx.array(pairs["noise"]), latents)
    condition = mx.array(pairs["condition"]) if "condition" in pairs else None
    made = sample_student(student, z, condition).data
    taught = student.data(mx.array(pairs["clean"]), z.shape)
    both = mx.stack([taught, made], axis=1).reshape(-1, *made.shape[1:])
    images = [image for image in pipe.to_images(both) if isinstance(image, Image.Image)]
    return SampleSheet(images, ["teacher", "student"] * count, columns=2)
