"""Several processes at once, started as `mlx.launch --backend ring` starts them, on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.paths import TESTS


def start(folder: Path, commands: Sequence[Sequence[object]]) -> list[subprocess.Popen[str]]:
    """Run Python with each of these arguments; its rank is its number."""
    sockets = [socket.socket() for _ in commands]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    for each in sockets:
        each.close()
    folder.mkdir(exist_ok=True)
    (folder / "hosts.json").write_text(json.dumps(hosts))
    environment = {
        **os.environ,
        "MLX_HOSTFILE": str(folder / "hosts.json"),
        "PYTHONPATH": str(TESTS),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment | {"MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str, str]]:
    """Each one's exit code, and what it wrote to standard output and to standard error."""
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]
