"""Whether a training may write where it is told to: what is found out before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import read_json
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.training.loop.checkpoint import checkpoint_files


def check_model_output(out: Path, model_type: str, inputs: Iterable[str | Path] = ()) -> None:
    """Raise StarflowError unless a training may write its model to `out`, checkpoints and logs to `out/training`.

    A model that is there must be of an earlier run of the same training. `inputs` are read, and cannot be `out`.
    """
    check_outputs(folders=[out, out / "training"], inputs=inputs)
    if not (out / "config.json").exists():
        return
    found = read_json(out / "config.json").get("model_type")
    if found != model_type or not checkpoint_files(out / "training/flow"):
        kind = "" if found == model_type else f" ({found!r}, not {model_type!r})"
        raise StarflowError(f"{out} holds another model{kind}; give another folder")
