"""The config of a flow that is to be trained: from a file, or that of a flow that there is already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import MOST_YAML, parse_yaml, read_text
from mlx_starflow.model_dir.directory import FLOWS, TEXT_FLOW, ModelDirectory
from mlx_starflow.models.starflow import FlowConfig

FROM_ENCODERS = ("img_size", "channel_size", "txt_size", "txt_dim", "mix_aspect")
"""What a STARFlow's config need not say: the cache knows it."""


def read_flow_config(path: str | Path) -> dict[str, Any]:
    """A flow's config from a YAML or JSON file, with its `model_type`.

    The file is like a model directory's `config.json`, or it is a YAML file of the official release.

    Raises:
        StarflowError: it cannot be read, or is for something else.
    """
    try:
        content = parse_yaml(read_text(Path(path), MOST_YAML))
    except ValueError as error:
        raise StarflowError(f"{path} is neither YAML nor JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise StarflowError(f"{path} must hold a flow's config, with lines such as 'channels: 256'")
    if "arguments" in content:
        content = FlowConfig.from_official(content).to_dict()
    kind = content.setdefault("model_type", "starflow")
    known = (*FLOWS, TEXT_FLOW)
    if kind not in known:
        raise StarflowError(f"{path}: model_type must be one of {', '.join(known)}, not {kind!r}")
    return content


def flow_config_of(model: str | Path) -> dict[str, Any]:
    """The config of a model's flow for a training that begins with its weights, as `read_flow_config` gives it.

    What follows from the data is left out; a STARFlow's positions stay scaled to the size that it was trained at.

    Raises:
        StarflowError: there is no such model.
    """
    directory = ModelDirectory.find(model)
    config = directory.flow.config
    values = {"model_type": directory.flow.content["model_type"], **config.to_dict()}
    if isinstance(config, FlowConfig):
        values = {key: value for key, value in values.items() if key not in FROM_ENCODERS}
        values["pt_seq_len"] = config.pt_seq_len
    else:
        values.pop("num_classes", None)
    if directory.pipeline:
        values["pipeline"] = directory.pipeline
    return values
