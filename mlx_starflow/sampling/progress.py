"""How far a call is: for progress bars, for callbacks, and for whoever wants to stop it; and memory meanwhile."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from mlx_starflow.errors import Cancelled, StarflowError
from mlx_starflow.kernels.memory import bounded, give_back
from mlx_starflow.sampling.bars import Bar

Item = TypeVar("Item")


class Counted(NamedTuple):
    """What has been done of a thing that is counted: `total` is None where nobody knows."""

    name: str
    done: int
    total: int | None
    unit: str


class Progress:
    """How far a call is, and the way to stop it; one for each call.

    All that samples, scores, edits or trains takes one as `progress`, and gives it to what it calls, down to the steps
    of sampling. `callback=show` is short for `progress=Progress(show)`.

    def show(progress: Progress) -> None:
        print(progress.phase, progress.block, progress.done, progress.total)

    A call says how far it is before each step: of sampling, that is before each network evaluation. `cancel` may be
    called from the callback or from another thread, also before the call begins, and takes effect there. On a GPU,
    which is given a few steps ahead, what has been said to be done may still be computed.

    All that takes long says how far it is, and so this is also where memory is bounded: as long as there is a phase, or
    anything is counted, see `kernels.memory.bounded`. What a phase has freed is given back at its end, since the next
    one's arrays have other sizes.

    Attributes:
        callback: is called with the progress itself.
        bar: show progress bars; None shows them on a terminal only.
    """

    def __init__(self, callback: Callable[[Progress], object] | None = None, *, bar: bool | None = False):
        self.callback, self.bar = callback, bar
        self._cancelled = threading.Event()
        self._phases: list[str] = []
        self._counters: list[Counter] = []
        self._decode: Callable[[Any], list[Image.Image]] | None = None
        self._began = time.perf_counter()

    # ---- for those who wait

    @property
    def phase(self) -> str:
        """What is being done: one of those that `GenerationStats.seconds` counts ("text", "flow", "verify", "denoise",
        "preview", "decode"), of scoring and editing "reading", "scoring", "encoding" and so on, of a training its name,
        such as "finetune"; "" before and after."""
        # Copies: other threads may ask while the lists change.
        phases, counters = tuple(self._phases), tuple(self._counters)
        return phases[-1] if phases else counters[-1].name if counters else ""

    @property
    def block(self) -> int | None:
        """Number of the flow block that is being inverted, from 0 on the data's side; None in other phases.

        Sampling begins with the last one, the deep block, and ends with block 0."""
        counter = self._counter()
        return counter.block if counter else None

    @property
    def done(self) -> int:
        """What is done of the phase, in its `unit`: tokens in the phase "flow", over all blocks."""
        counter = self._counter()
        return counter.done if counter else 0

    @property
    def total(self) -> int | None:
        """What there is to do in the phase; None where it is not counted."""
        counter = self._counter()
        return counter.total if counter else None

    @property
    def unit(self) -> str:
        """What `done` and `total` count; "" where nothing is counted."""
        counter = self._counter()
        return counter.unit if counter else ""

    @property
    def counted(self) -> tuple[Counted, ...]:
        """All that is being counted, outermost first: batches, for instance, and the tokens of this one."""
        return tuple(counter.counted for counter in tuple(self._counters))

    @property
    def note(self) -> str:
        """What there is to say of the phase besides, such as a training's loss; "" if nothing."""
        counter = self._counter()
        return counter.note if counter else ""

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.perf_counter() - self._began

    def preview(self) -> list[Image.Image]:
        """What the images of this batch look like so far; to be called from the callback.

        That is the state that sampling is in, as `keep_steps` shows it, decoded: noise at first. Decoding takes as long
        as that of the finished images. Of a video it is the frame that is being sampled, and in the phase "preview" of
        `VideoPipeline.stream(previews=True)` the one that has been, cleaned without those after it. Empty outside of
        the phases "flow", "preview" and "inpainting", and in trainings.
        """
        counter = self._counter()
        if counter is None or counter.state is None or self._decode is None:
            return []
        return self._decode(counter.state())

    def cancel(self) -> None:
        """End the call at its next step: it raises `Cancelled`. A pipeline can be used again, and a training saves."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()

    def __str__(self) -> str:
        block = "" if self.block is None else f", block {self.block}"
        return f"{self.phase}{block}: {self.done}/{'?' if self.total is None else self.total} {self.unit}"

    # ---- for those who work

    def check(self) -> None:
        """Raise Cancelled if the call was cancelled."""
        if self._cancelled.is_set():
            raise Cancelled("cancelled")

    def tell(self) -> None:
        """Call the callback. Raises Cancelled."""
        self.check()
        if self.callback is not None:
            self.callback(self)
            self.check()

    @contextmanager
    def running(self, phase: str) -> Iterator[None]:
        """What happens inside is this phase, and not the one that it interrupts."""
        with bounded():
            self._phases.append(phase)
            try:
                self.tell()
                yield
            finally:
                self._phases.pop()
                give_back()

    @contextmanager
    def counting(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        label: str = "",
        leave: bool = True,
        shown: bool = True,
    ) -> Iterator[Counter]:
        """Count what is done inside.

        Args:
            name: the phase's that it belongs to.
            total: how much there is.
            unit: what is counted.
            done: what was done before, in an earlier run.
            label: of the bar, if it is not the name.
            leave: the bar stays when it is full.
            shown: there is a bar at all, where bars are asked for.
        """
        hide = None if self.bar is None else not self.bar
        hide = hide if shown else True
        bar = Bar(total=total, initial=done, desc=label or name, unit=unit, disable=hide, leave=leave)
        with bounded(), bar:
            counter = Counter(self, name, total, unit, bar)
            counter.done = done
            self._counters.append(counter)
            try:
                yield counter
            finally:
                self._counters.remove(counter)
                if not self.phase:
                    give_back()

    def each(self, name: str, items: Iterable[Item], unit: str) -> Iterator[Item]:
        """The same items, counted as they are taken."""
        with self.counting(name, len(items) if isinstance(items, Sized) else None, unit) as counter:
            for item in items:
                yield item
                counter.advance()

    @contextmanager
    def previewing(self, decode: Callable[[Any], list[Image.Image]]) -> Iterator[None]:
        """Inside, states of sampling are made images by this function."""
        before, self._decode = self._decode, decode
        try:
            yield
        finally:
            self._decode = before

    def _counter(self) -> Counter | None:
        phase = self.phase
        return next((each for each in reversed(tuple(self._counters)) if each.name == phase), None)


class Counter:
    """What is counted in a phase.

    Attributes:
        block: see `Progress.block`.
        state: gives the state that sampling is in, data `[B, ...]`, if it is known.
        note: see `Progress.note`.
    """

    def __init__(self, progress: Progress, name: str, total: int | None, unit: str, bar: Bar):
        self.name, self.done, self.total, self.unit = name, 0, total, unit
        self.block: int | None = None
        self.state: Callable[[], Any] | None = None
        self.note = ""
        self._progress, self._bar = progress, bar

    @property
    def counted(self) -> Counted:
        return Counted(self.name, self.done, self.total, self.unit)

    def advance(self, count: int = 1) -> None:
        """So many more are done, or none: then this is a step all the same. Raises Cancelled."""
        self.done += count
        self._bar.update(count)
        self._progress.tell()

    def remark(self, note: str) -> None:
        """Say this beside the numbers, until there is something else to say."""
        self.note = note
        self._bar.set_postfix_str(note)

    def write(self, line: str) -> None:
        """Print a line on standard error, for which bars make way."""
        self._bar.write(line, file=sys.stderr)


Watch = Progress | bool | None
"""How a call says how far it is: a progress; or whether to show progress bars, None on a terminal only."""

Callback = Callable[[Progress], object]


def watch(progress: Watch, callback: Callback | None = None) -> Progress:
    """The progress of a call that was given these. Raises StarflowError."""
    if not isinstance(progress, Progress):
        return Progress(callback, bar=progress)
    if callback is not None:
        raise StarflowError("a progress has its own callback: give Progress(callback) alone")
    return progress
