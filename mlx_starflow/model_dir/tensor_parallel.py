"""One flow on several processes, each with a part of every large matrix (arXiv 1909.08053, section 3).

A rank has some of the heads of each attention, their keys and values included, and some of the hidden numbers of each
MLP. Its two parts of a layer's output are added up over all ranks: two messages of the size of `[B, N, channels]` a
layer. Everything else, the small projections at a flow's ends included, every rank computes for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import shard_linear

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.kernels import MLX_VERSION
from mlx_starflow.model_dir.files import read_config
from mlx_starflow.model_dir.hub import find_model
from mlx_starflow.model_dir.transaction import STAGE
from mlx_starflow.model_dir.weights import automatic_dtype, cast_weights, parse_dtype
from mlx_starflow.models.transformer import MLP, Attention
from mlx_starflow.models.trees import flattened

Flow = TypeVar("Flow", bound=nn.Module)

SAMPLES = 64
"""Places in a file of weights that ranks compare."""
SAMPLE_BYTES = 4096


def load_part(flow: Flow, what: str | Path, dtype: mx.Dtype | None, group: mx.distributed.Group) -> Flow:
    """This rank's part of a flow, read; of each tensor, only its part stays in memory.

    Args:
        flow: whole, none of its weights read yet, and known to nobody else: changed in place, and returned.
        what: what to call it in error messages.
        dtype: of the weights, see `weights.cast_weights`.

    Raises:
        StarflowError: its weights cannot be read, or its layers cannot be split into so many parts.
    """
    cast_weights(flow, dtype)
    shard(flow, group, what)
    try:
        # One after another: MLX reads a tensor whole before it takes a part.
        for _, weight in flattened(flow.parameters()):
            mx.eval(weight)
            mx.clear_cache()
    except RuntimeError as error:
        raise StarflowError(f"cannot read {what}: {one_line(error)}") from error
    return flow


def shard(module: nn.Module, group: mx.distributed.Group, what: str | Path) -> None:
    """Let every attention and MLP of a module, dense or quantized, keep this rank's part. Reads nothing.

    Raises:
        StarflowError: `what` cannot be split so; the module is as it was then.
    """
    parts = [part for _, part in module.named_modules() if isinstance(part, Attention | MLP)]
    for part in parts:
        _check(part, group.size(), what)
    for part in parts:
        if isinstance(part, Attention):
            dim = part.head_dim
            segments = [part.num_heads * dim, (part.num_heads + part.num_kv_heads) * dim]
            part.qkv = shard_linear(part.qkv, "all-to-sharded", segments=segments, group=group)
            part.proj = shard_linear(part.proj, "sharded-to-all", group=group)
            part.num_heads, part.num_kv_heads = part.num_heads // group.size(), part.num_kv_heads // group.size()
        elif "gate_proj" in part:
            part.gate_proj = shard_linear(part.gate_proj, "all-to-sharded", group=group)
            part.up_proj = shard_linear(part.up_proj, "all-to-sharded", group=group)
            part.down_proj = shard_linear(part.down_proj, "sharded-to-all", group=group)
        else:
            first, activation, last = part.main
            first = shard_linear(first, "all-to-sharded", group=group)
            part.main = [first, activation, shard_linear(last, "sharded-to-all", group=group)]


def _check(part: Attention | MLP, ranks: int, what: str | Path) -> None:
    if isinstance(part, Attention):
        for count, heads in ((part.num_heads, "attention heads"), (part.num_kv_heads, "heads of keys and values")):
            if count % ranks:
                raise StarflowError(f"{what}: {count} {heads} cannot be split into {ranks} parts; start fewer ranks")
        last: nn.Module = part.proj
    else:
        last = part.down_proj if "down_proj" in part else part.main[2]
    columns = last.weight.shape[1]
    if isinstance(last, nn.QuantizedLinear):
        columns = columns * 32 // last.bits // last.group_size
    if columns % ranks:
        parts = "groups of quantized weights" if isinstance(last, nn.QuantizedLinear) else "hidden numbers of an MLP"
        raise StarflowError(f"{what}: {columns} {parts} cannot be split into {ranks} parts; start fewer ranks")


# ---- what all ranks must have in common


def agree(group: mx.distributed.Group, facts: Mapping[str, object] | StarflowError) -> None:
    """Raise StarflowError on every rank unless all of them name the same facts.

    Args:
        facts: values by what they are called; all ranks must give the same names. Or the mistake that kept this rank
            from finding out, which is raised again here, while the others say which rank made it.
    """
    found = {} if isinstance(facts, StarflowError) else facts
    names = sorted(found)
    digests = [sha256(repr(found[name]).encode()).digest() for name in names]
    failed = isinstance(facts, StarflowError)
    said = np.array([[failed]], np.int32)
    bad = np.flatnonzero(np.array(mx.distributed.all_gather(mx.array(said), group=group)))
    if isinstance(facts, StarflowError):
        raise facts
    if len(bad):
        raise StarflowError(f"rank {bad[0]} of this run ends with a mistake of its own, which it names")
    if not names:
        return
    mine = np.frombuffer(b"".join(digests), np.uint8).astype(np.int32)[None]
    all_of_them = np.array(mx.distributed.all_gather(mx.array(mine), group=group))
    different = (all_of_them != all_of_them[:1]).reshape(len(all_of_them), len(names), -1).any(axis=(0, 2))
    for name, differs in zip(names, different, strict=True):
        if differs:
            raise StarflowError(f"the ranks of this run do not have the same {name}; make it the same on every machine")


@contextmanager
def together(group: mx.distributed.Group | None) -> Iterator[None]:
    """A StarflowError in this block on one rank ends all of them; all ranks must enter it."""
    mistake: StarflowError | None = None
    try:
        yield
    except StarflowError as error:
        mistake = error
    if group is not None:
        agree(group, mistake or {})
    elif mistake is not None:
        raise mistake


def check_same(
    name: str | Path, dtype: str | mx.Dtype | None, group: mx.distributed.Group, *, download: bool = True
) -> None:
    """Raise StarflowError on every rank unless all of them can read the same model at the same precision."""
    facts: dict[str, object] = {}
    with together(group):
        directory = find_model(name, download=download)
        read_config(directory)
        facts = {
            f"files of the model {name}": files_digest(directory),
            "precision (--dtype)": str(parse_dtype(dtype) or automatic_dtype()),
            "version of MLX": MLX_VERSION,
        }
    agree(group, facts)


def files_digest(directory: Path) -> str:
    """What tells one model directory from another: its files' names and sizes, and samples of what is in them."""
    digest = sha256()
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or STAGE in path.parts or path.suffix not in (".json", ".safetensors", ".model"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory).as_posix()}\0{size}\0".encode())
        try:
            with open(path, "rb") as file:
                for place in sorted({int(at) for at in np.linspace(0, max(size - SAMPLE_BYTES, 0), SAMPLES)}):
                    file.seek(place)
                    digest.update(file.read(SAMPLE_BYTES))
        except OSError as error:
            raise StarflowError(f"cannot read {path}: {one_line(error)}") from error
    return digest.hexdigest()
