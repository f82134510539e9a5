"""Several processes: what each of them does with its share of a batch, and how they agree."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.transaction import locked
from mlx_starflow.training.loop.weights import Weights

GRACE_SECONDS = 3.0
"""Seconds in which MLX may find out by itself that a process has ended."""
NOTICE_SECONDS = 0.2
"""Seconds in which a process that ends is noticed here, while MLX may go on with what it has not received."""
CONNECT_SECONDS = 10.0
"""Seconds in which processes must have found each other."""


def world() -> mx.distributed.Group:
    """The processes that `mlx.launch` started; without it, this one alone."""
    return mx.distributed.init()


def share(batch: Mapping[str, np.ndarray], part: int, parts: int) -> dict[str, mx.array]:
    """Rows of part number `part` of a batch that is split into `parts`; arrays may have different numbers of rows."""
    sizes = {name: len(array) // parts for name, array in batch.items()}
    return {name: mx.array(array[part * sizes[name] : (part + 1) * sizes[name]]) for name, array in batch.items()}


def average(gradients: Weights, group: mx.distributed.Group) -> Weights:
    """The mean of the gradients of all processes."""
    if group.size() == 1:
        return gradients
    # As a list: MLX would take the dots in names for a tree.
    return dict(zip(gradients, nn.average_gradients(list(gradients.values()), group), strict=True))


def mean_numbers(rows: Sequence[Mapping[str, float]], group: mx.distributed.Group) -> dict[str, float]:
    """Means over rows of the same keys, those of all processes: over finite numbers, NaN if there are none.

    But `loss` is not finite if one of them is not.
    """
    names = list(rows[0])
    values = np.array([[row[name] for name in names] for row in rows])
    finite = np.isfinite(values)
    sums = np.concatenate([np.where(finite, values, 0).sum(axis=0), finite.sum(axis=0), [len(rows)]])
    if group.size() > 1:
        sums = np.array(mx.distributed.all_sum(mx.array(sums.astype(np.float32)), group=group), np.float64)
    total, count = np.split(sums[:-1], 2)
    means = {name: t / c if c else math.nan for name, t, c in zip(names, total, count, strict=True)}
    if count[names.index("loss")] < sums[-1]:
        means["loss"] = math.nan
    return means


def any_of(flag: bool, group: mx.distributed.Group) -> bool:
    """Whether it is set in any process."""
    return flag if group.size() == 1 else bool(mx.distributed.all_sum(mx.array(int(flag)), group=group).item())


def wait(group: mx.distributed.Group) -> None:
    """Return when all processes are here."""
    any_of(False, group)


def from_first(arrays: Weights, note: Any, group: mx.distributed.Group) -> tuple[Weights, Any]:
    """The arrays and the JSON value of rank 0, on all processes. Arrays must have the same names and shapes."""
    if group.size() == 1:
        return arrays, note

    def send(array: mx.array) -> mx.array:
        sent = mx.distributed.all_sum(array if group.rank() == 0 else mx.zeros_like(array), group=group)
        mx.eval(sent)
        return sent

    text = json.dumps(note).encode() if group.rank() == 0 else b""
    length = int(send(mx.array(len(text))))
    held = np.zeros(length, np.int32)
    held[: len(text)] = np.frombuffer(text, np.uint8)
    note = json.loads(bytes(np.array(send(mx.array(held))).astype(np.uint8)))
    return {name: send(array) for name, array in arrays.items()}, note


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """The folder of a run, which is this run's alone: rank 0 locks it. All processes enter this together.

    Raises:
        StarflowError: in all of them, if another run has it.
    """
    group = world()
    with ExitStack() as stack:
        taken = None
        if group.rank() == 0:
            try:
                stack.enter_context(locked(folder))
            except StarflowError as error:
                taken = str(error)
        _, taken = from_first({}, taken, group)
        if taken:
            raise StarflowError(taken)
        yield


def first_does(action: Callable[[], None], name: str) -> None:
    """Have rank 0 do something that the others wait for; all processes call this together.

    `name` is the command's, as in `peers`. Raises the action's StarflowError in all of them.
    """
    group = world()
    failure = None
    with peers(name, group):
        if group.rank() == 0:
            try:
                action()
            except StarflowError as error:
                failure = error
        _, told = from_first({}, str(failure) if failure else None, group)
    if failure or told:
        raise failure or StarflowError(told)


def check_sharding(group: mx.distributed.Group) -> None:
    """Raise StarflowError unless the backend can scatter sums, which sharded training needs."""
    try:
        mx.eval(mx.distributed.sum_scatter(mx.ones((group.size(), 1)), group=group))
    except RuntimeError:
        raise StarflowError(
            "training: --shard needs the nccl or jaccl backend, the ring backend cannot scatter sums: "
            "start it with mlx.launch --backend jaccl (or nccl), or leave --shard out"
        ) from None


@contextmanager
def peers(
    name: str, group: mx.distributed.Group, hint: str = "run the same command again to resume"
) -> Iterator[Callable[[], None]]:
    """Makes one clear line of the end of another process; all processes must enter it together.

    Args:
        name: of the command, which begins the line.
        hint: what to do then, which ends it.

    Returns:
        What raises StarflowError with this line if another process has ended. Call it before numbers from all processes
        are kept: MLX's ring gives wrong ones, and no error, when a connection closes while it receives.
    """

    def message(reason: object) -> str:
        return f"{name}: rank {group.rank()} ends because another process of this run has ended ({reason}); {hint}"

    links = _links(group) if group.size() > 1 else []
    over, ended = threading.Event(), threading.Event()
    closed = "it has closed its connection"

    def check() -> None:
        if links and ended.wait(NOTICE_SECONDS):
            raise StarflowError(message(closed))

    def watch(link: socket.socket) -> None:
        try:
            alive = link.recv(1)
        except OSError:
            alive = b""
        # MLX finds out by itself if it is waiting for that process, and waits for ever if it has only yet to start.
        if not alive and not over.is_set():
            ended.set()
            if not over.wait(GRACE_SECONDS):
                print(f"Error: {message(closed)}", file=sys.stderr, flush=True)
                os._exit(2)

    for link in links:
        threading.Thread(target=watch, args=(link,), daemon=True).start()
    try:
        yield check
    except StarflowError:
        check()  # what was wrong may come of it
        raise
    except RuntimeError as error:
        if group.size() == 1 or "connection" not in str(error):
            raise
        raise StarflowError(message(error)) from None
    finally:
        over.set()
        for link in links:
            with suppress(OSError):
                link.sendall(b".")
            link.close()


def _links(group: mx.distributed.Group) -> list[socket.socket]:
    """A connection of rank 0 with each of the others, as far as they reach it by its name."""
    if group.rank() == 0:
        with socket.create_server(("", 0)) as server:
            server.settimeout(CONNECT_SECONDS)
            from_first({}, [socket.gethostname(), server.getsockname()[1]], group)
            links: list[socket.socket] = []
            with suppress(OSError):
                while len(links) < group.size() - 1:
                    links.append(server.accept()[0])
    else:
        _, (host, port) = from_first({}, None, group)
        links = []
        with suppress(OSError):
            links.append(socket.create_connection((host, port), timeout=CONNECT_SECONDS))
    for link in links:
        link.settimeout(None)
    return links
