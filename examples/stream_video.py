"""A video that can be watched while it is being made, and then goes on from where it ended.

python examples/stream_video.py MODEL "waves at a beach" waves.mp4
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mlx_starflow import load_video
from mlx_starflow.media.videos import VideoWriter, read_video

model, prompt, target = sys.argv[1], sys.argv[2], Path(sys.argv[3])
pipe = load_video(model)

began = time.perf_counter()
stream = pipe.stream(prompt, seed=1)
with VideoWriter(target, stream.fps, metadata=stream.metadata, live=True) as writer:
    for number, frame in enumerate(stream, 1):
        writer.add(frame)  # it is on disk now
        print(f"frame {number} of {stream.frames} after {time.perf_counter() - began:.1f} s")

longer = target.with_stem(f"{target.stem}-longer")
more = pipe.stream(prompt, seed=2, extend=target, frames=8)
with VideoWriter(longer, more.fps) as writer:
    for part in (read_video(target), more):
        for frame in part:
            writer.add(frame)
print(f"{longer}: {writer.frames} frames of {more.size[0]}x{more.size[1]}")
