"""Whether memory grows in a long run: many pictures and short videos in one process, sizes and settings mixed.

    python examples/reports/soak.py SCRATCH                          # 500 pictures and 20 videos
    python examples/reports/soak.py SCRATCH --pictures 100 --videos 10

Pictures are the embedded model's, in several sizes, methods, batches and bits of keys and values, and one of ten is
scored and varied; videos are those of a small random model. After each tenth it prints what MLX holds, what of it is
kept for later arrays, what the process holds, files that are open and threads; at the end, the last of each beside
those after the first tenth.
"""

from __future__ import annotations

import argparse
import gc
import platform
import threading
import time
import warnings
from dataclasses import astuple, dataclass
from pathlib import Path

import mlx.core as mx
from full_size_run import write_random_model
from video_memory import small_model

from mlx_starflow import VideoPipeline, load, load_video
from mlx_starflow.pipelines import ImagePipeline

SIZES = ((64, 64), (128, 64), (64, 128), (96, 96), (128, 128))
METHODS = ("rolling", "sequential", "jacobi")
FRAMES, VIDEO_SIZES = (5, 9, 13, 17), ((96, 96), (128, 64), (64, 96))
OFTEN = 10
"""Pictures of which one is scored and varied."""

BOUND = 1.03
"""Times what the process held after the first tenth."""


@dataclass(frozen=True)
class Held:
    """MiB of MLX's arrays, of its freed buffers and of the process; open files; threads."""

    arrays: float
    freed: float
    process: float
    files: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(list(Path("/proc/self/fd").iterdir()))
        mib = 2**20
        sizes = (mx.get_active_memory() / mib, mx.get_cache_memory() / mib, pages * 4096 / mib)
        threads = len(list(Path("/proc/self/task").iterdir()))
        return cls(*sizes, files, max(threads, threading.active_count()))

    def __str__(self) -> str:
        return (
            f"arrays {self.arrays:.1f} MiB, freed {self.freed:.0f}, process {self.process:.0f}, "
            f"{self.files} files, {self.threads} threads"
        )


def make(number: int, pictures: ImagePipeline, videos: VideoPipeline | None, scratch: Path) -> None:
    """A round's picture, or video."""
    settings = {"seed": number, "method": METHODS[number % 3], "kv_bits": ("none", "8", "4")[number // 3 % 3]}
    if videos is not None:
        frames, size = FRAMES[number % len(FRAMES)], VIDEO_SIZES[number % len(VIDEO_SIZES)]
        videos.stream("a cat", frames=frames, size=size, **settings).save(scratch / "soak.webp")
    else:
        batch = 1 + number % 2
        result = pictures.generate("a red apple", size=SIZES[number % len(SIZES)], images=batch, **settings)
        result.save(scratch / "soak.png")
        if number % OFTEN == 0:
            size = SIZES[number // OFTEN % len(SIZES)]
            pictures.score(result.images, "a red apple", draws=1, size=size)
            pictures.vary(result.images[0], "a red apple", strength=0.3, size=size).images[0].save(scratch / "soak.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--videos", type=int, default=20)
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # about sizes that the embedded model was not trained at
    print(f"machine: {platform.platform()}, MLX {mx.__version__} on the {mx.default_device().type.name}", flush=True)
    write_random_model(args.scratch / "model", small_model(), "8", 2.0)
    pictures, videos = load("demo"), load_video(args.scratch / "model")
    began, first, held = time.monotonic(), None, None
    for tenth in range(10):
        for number in range(tenth * args.videos // 10, (tenth + 1) * args.videos // 10):
            make(number, pictures, videos, args.scratch)
        for number in range(tenth * args.pictures // 10, (tenth + 1) * args.pictures // 10):
            make(number, pictures, None, args.scratch)
        held = Held.now()
        first = first or held
        print(f"{(tenth + 1) * 10:>3}%, {time.monotonic() - began:.0f} s: {held}", flush=True)
    assert first is not None and held is not None
    names = ("arrays", "freed", "process", "files", "threads")
    ratios = [last / max(before, 1e-9) for before, last in zip(astuple(first), astuple(held), strict=True)]
    print("after all / after the first tenth: " + ", ".join(f"{n} {r:.3f}" for n, r in zip(names, ratios, strict=True)))
    print("within 3%" if ratios[2] <= BOUND and ratios[0] <= BOUND else "it grows")


if __name__ == "__main__":
    main()
