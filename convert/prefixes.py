"""What training scripts put around a flow's tensors: prefixes of their names, averaged weights beside them, shards.

A name that a flow knows begins with `blocks.0.`. Whatever stands before it, `module.` of DistributedDataParallel,
`_orig_mod.` of `torch.compile`, the wrapped modules of FSDP or a trainer's attribute, is taken off, and said.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from mlx_starflow.convert.common import open_checkpoint
from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.convert.wrappers import is_average
from mlx_starflow.errors import StarflowError, printable

PREFIXES = ("module", "model", "net", "network", "flow", "generator", "state_dict", "model_state_dict")
"""Parts of names that mean the flow itself, beside those of averaged weights, see `is_average`."""

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_FLAT = ("_flat_param", "flat_param")
_BLOCKS = re.compile(r"((?:[^.]+\.)*?)blocks\.\d+\.")


def open_flow_tensors(path: Path, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a flow's checkpoint under the flow's own names, none of them read yet.

    Args:
        path: as in `open_checkpoint`.
        ema: take the averaged weights, which many trainings keep beside the last ones. Where there are no others they
            are taken in any case.

    Raises:
        StarflowError: it cannot be read, there are no averaged weights, or what stands before the tensors' names is
            not known.
    """
    opened = open_checkpoint(path, ema)
    tensors = _unwrapped(opened.tensors, path)
    off = [f"{part}." for part in _WRAPPED if any(part in name.split(".") for name in opened.tensors)]
    found = {match[1] for name in tensors if (match := _BLOCKS.match(name))}
    averages = _shortest(prefix for prefix in found if is_average(prefix))
    others = _shortest(prefix for prefix in found if not is_average(prefix))
    averaged = is_average(opened.wrapper)
    if ema and not averaged and not averages:
        raise StarflowError(f"{path} holds no averaged weights: leave out --ema")
    chosen = averages if ema and not averaged else others or averages
    if len(chosen) > 1:
        under = " and ".join(map(printable, chosen))
        raise StarflowError(f"{path} holds several flows, under {under}: save the one that is meant alone")
    prefix = chosen[0] if chosen else ""
    unknown = [part for part in prefix.split(".") if part and part not in PREFIXES and not is_average(part)]
    if unknown:
        raise StarflowError(
            f"{path}: the names of its tensors begin with {printable(prefix)!r}, which is no beginning that is known "
            f"({', '.join(PREFIXES)}, ema): save the flow's own state_dict()"
        )
    aside = () if prefix else tuple(averages)
    taken = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not (aside and name.startswith(aside))
    }
    left = [part for part in (*opened.others, *averages) if not ema and is_average(part) and part != prefix]
    if off := [*([printable(prefix)] if prefix else []), *off]:
        dropped = f", and {len(tensors) - len(taken)} other tensors left out" if len(taken) < len(tensors) else ""
        warnings.warn(f"{path}: {' and '.join(off)} taken off the tensors' names{dropped}", stacklevel=2)
    if left:
        warnings.warn(f"{path}: averaged weights are there too ({printable(left[0])}): --ema takes them", stacklevel=2)
    return taken


def _unwrapped(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors without what PyTorch's wrappers add within their names."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if any(part in _FLAT for part in parts):
            raise StarflowError(
                f"{path} holds FSDP's flattened parameters ({printable(name)}), which only the training can take "
                "apart: save it with StateDictType.FULL_STATE_DICT"
            )
        new = ".".join(part for part in parts if part not in _WRAPPED)
        if new in out:
            raise StarflowError(
                f"{path}: the tensor {printable(new)} is there twice, the second time as {printable(name)}"
            )
        out[new] = tensor
    return out


def _shortest(prefixes: Iterable[str]) -> list[str]:
    """Those that no other one of them is the beginning of."""
    known = sorted(prefixes)
    return [prefix for prefix in known if not any(prefix != other and prefix.startswith(other) for other in known)]
