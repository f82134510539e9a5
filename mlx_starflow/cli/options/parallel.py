"""The option `--tensor-parallel`: a command that the processes of `mlx.launch` run together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import click

from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    import mlx.core as mx

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Seed = TypeVar("Seed", bound=int | list[int] | None)


class Ranks:
    """What a command has to know about the others that run it; without `--tensor-parallel` there are none.

    Attributes:
        group: for `pipeline.load`; None: this process is alone.
        first: whether this is the one that writes and prints.
    """

    def __init__(self, group: mx.distributed.Group | None = None):
        self.group = group
        self.first = group is None or group.rank() == 0

    def seed(self, seed: Seed) -> Seed | int:
        """The seed that is given, or else one that rank 0 draws for all."""
        if self.group is None or seed is not None:
            return seed
        from mlx_starflow.media.noise import draw_seed
        from mlx_starflow.training.loop.distributed import from_first

        return from_first({}, draw_seed(), self.group)[1]

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raise StarflowError on all ranks unless they name the same facts."""
        if self.group is not None:
            from mlx_starflow.model_dir.tensor_parallel import agree

            agree(self.group, facts)

    def together(self) -> AbstractContextManager[None]:
        """A StarflowError in this block on one rank ends all of them."""
        if self.group is None:
            return nullcontext()
        from mlx_starflow.model_dir.tensor_parallel import together

        return together(self.group)

    def agree_on_files(self, files: Mapping[str, Path]) -> None:
        """Raise StarflowError on all ranks unless the same is in these files, or in the files of these folders."""
        if self.group is None:
            return
        from hashlib import sha256

        digests = {}
        with self.together():
            for name, path in files.items():
                paths = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
                try:
                    digests[f"--{name} {path}"] = [sha256(each.read_bytes()).digest() for each in paths]
                except OSError as error:
                    raise StarflowError(f"{path} cannot be read: {error.strerror}") from None
        self.agree(digests)

    def agree_on_method(self, method: str) -> None:
        """All methods but the sequential one stop where the numbers say so: all ranks must get the same ones then."""
        if self.group is not None and method != "sequential":
            import mlx.core as mx

            self.agree({"kind of chip, which all methods but sequential need": mx.device_info()["device_name"]})


def tensor_parallel_option(
    function: Callable[Concatenate[Ranks, Arguments], Result],
) -> Callable[Concatenate[bool, Arguments], Result]:
    """Add `--tensor-parallel` to a command, whose first parameter is its `Ranks`."""
    name = function.__name__

    @click.option("--tensor-parallel", is_flag=True, help="Split the flow over the processes of mlx.launch.")
    @wraps(function)
    def command(tensor_parallel: bool, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        if not tensor_parallel:
            return function(Ranks(), *arguments, **options)
        from mlx_starflow.training.loop import distributed

        group = _world(name)
        with distributed.peers(name, group, "run the same command again"):
            return function(Ranks(group), *arguments, **options)

    return command


def _world(name: str) -> mx.distributed.Group:
    from mlx_starflow.training.loop import distributed

    try:
        group = distributed.world()
    except RuntimeError as error:
        raise StarflowError(f"--tensor-parallel: the processes cannot reach each other: {error}") from None
    if group.size() == 1:
        raise StarflowError(
            "--tensor-parallel needs two processes or more, and a backend of mlx.distributed that connects them: "
            f"mlx.launch -n 2 --backend ring -- mlx-starflow {name} ..."
        )
    return group
