"""Who pays for what: seconds and memory of the phases of generating."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mlx_starflow.pipelines.backend import Backend
from mlx_starflow.pipelines.results import GenerationStats
from mlx_starflow.sampling.progress import Progress

Item = TypeVar("Item")


class Phases:
    """Charges what a backend computes to phases, which may interrupt one another."""

    def __init__(self, backend: Backend[Any]):
        self._backend = backend
        self._running: tuple[GenerationStats, str] | None = None
        self._began = 0.0

    @contextmanager
    def run(self, stats: GenerationStats, name: str, progress: Progress) -> Iterator[None]:
        """What happens inside is charged to this phase, and not to one that it interrupts; `progress` is told of it."""
        around, here = self._running, (stats, name)
        self._charge(around)
        self._running = here
        try:
            with progress.running(name):
                yield
        finally:
            self._charge(here)
            self._running = around

    def each(self, stats: GenerationStats, name: str, items: Iterable[Item], progress: Progress) -> Iterator[Item]:
        """The same items; making each of them is charged to a phase."""
        waiting = iter(items)
        while True:
            with self.run(stats, name, progress):
                item = next(waiting, None)
            if item is None:
                return
            yield item

    def _charge(self, phase: tuple[GenerationStats, str] | None) -> None:
        memory = self._backend.finish_phase()
        if phase is not None:
            stats, name = phase
            stats.spend(name, time.perf_counter() - self._began, memory)
        self._backend.start_phase()
        self._began = time.perf_counter()
