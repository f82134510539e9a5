"""What has happened so far, in numbers, as Prometheus reads them."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

Labels = tuple[tuple[str, str], ...]

HELP = {
    "mlx_starflow_requests_total": "Requests answered, by route and status.",
    "mlx_starflow_jobs_total": "Jobs that have ended, by kind and state.",
    "mlx_starflow_job_seconds_total": "Seconds that jobs have run, by kind.",
    "mlx_starflow_wait_seconds_total": "Seconds that jobs have waited in the queue.",
    "mlx_starflow_images_total": "Images and videos finished.",
}


class Metrics:
    """Counters; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, Labels], float] = {}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to `mlx_starflow_NAME_total`."""
        with self._lock:
            key = f"mlx_starflow_{name}_total", tuple(labels.items())
            self._counters[key] = self._counters.get(key, 0.0) + by

    def text(self, gauges: dict[str, float]) -> str:
        """All of them, and these values of now, in Prometheus' text format."""
        with self._lock:
            counters = dict(self._counters)
        return "\n".join([*_lines(counters), *_gauges(gauges | memory())]) + "\n"


def _lines(counters: dict[tuple[str, Labels], float]) -> Iterator[str]:
    for name, said in HELP.items():
        yield f"# HELP {name} {said}"
        yield f"# TYPE {name} counter"
        for (own, labels), value in sorted(counters.items()):
            if own == name:
                inside = ",".join(f'{key}="{_escaped(each)}"' for key, each in labels)
                yield f"{name}{{{inside}}} {value:g}" if inside else f"{name} {value:g}"


def _gauges(values: dict[str, float]) -> Iterator[str]:
    for name, value in values.items():
        yield f"# TYPE mlx_starflow_{name} gauge"
        yield f"mlx_starflow_{name} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def memory() -> dict[str, float]:
    """Bytes of memory: of MLX's arrays, of what it keeps for later, and of the process."""
    return {
        "mlx_active_bytes": float(mx.get_active_memory()),
        "mlx_cache_bytes": float(mx.get_cache_memory()),
        "mlx_peak_bytes": float(mx.get_peak_memory()),
        "resident_bytes": float(resident()),
    }


def resident() -> int:
    """Bytes of memory that the process holds now; at most ever, where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
