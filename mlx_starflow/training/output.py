"""Whether a training may write where it is told to: what is found out before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import exists, inside, read_json, read_text, replacing
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.training.loop.checkpoint import checkpoint_files

CLAIM = "training/model.txt"
"""In a training's output, the fingerprint of the model there that an earlier run wrote."""


def check_model_output(
    out: Path, model_type: str, inputs: Iterable[str | Path] = (), *, checkpoints: str = "flow"
) -> None:
    """Raise StarflowError unless a training may write its model to `out`, checkpoints and logs to `out/training`.

    A model that is there must be of an earlier run of the same training: there are checkpoints of its flow or, where a
    run that started again has thrown them away, what `claim_model` wrote. `inputs` are read, and cannot be `out`.
    `checkpoints`: the folder of those in `out/training`.
    """
    check_outputs(folders=[out, out / "training"], inputs=inputs)
    if not (out / "config.json").exists():
        return
    found = read_json(out / "config.json").get("model_type")
    if found != model_type or not (checkpoint_files(out / "training" / checkpoints) or _is_claimed(out)):
        kind = "" if found == model_type else f" ({found!r}, not {model_type!r})"
        raise StarflowError(f"{out} holds another model{kind}; give another folder")


def claim_model(out: Path) -> None:
    """Write down that the model in `out`, if there is one, is this training's, before checkpoints are thrown away.

    Call it after `check_model_output`.
    """
    with suppress(StarflowError):  # a damaged model is nobody's
        mark = fingerprint(out)
        with replacing(out / CLAIM, makes_folder=True) as temporary:
            temporary.write_text(mark + "\n", encoding="utf-8")


def _is_claimed(out: Path) -> bool:
    try:
        return exists(out / CLAIM) and read_text(inside(out, CLAIM)).strip() == fingerprint(out)
    except StarflowError:
        return False
