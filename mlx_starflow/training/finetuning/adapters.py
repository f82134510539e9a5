"""Training adapters: mlx-lm's LoRA and DoRA layers on chosen layers of a flow, and writing them to a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.adapters import CONFIG_FILE, KINDS, WEIGHTS_FILE, linear_layers, replace_layers
from mlx_starflow.model_dir.files import write_safetensors
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.models.student import Student

LAYERS = ("qkv", "proj", "main.0", "main.2", "gate_proj", "up_proj", "down_proj", "proj_txt")
"""Layers that adapters can change: all linear ones but those that hand over tokens and affine parameters."""

BLOCKS = ("all", "deep", "shallow")
"""Names for groups of flow blocks; the deep block is the last one."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What kind of adapter, and on which layers.

    Attributes:
        kind: "lora" (arXiv 2106.09685) or "dora" (arXiv 2402.09353).
        rank: of the change of each layer.
        scale: the change is multiplied by it; papers write alpha / rank.
        dropout: share of a layer's inputs that its adapter does not see, while training.
        layers: names among `LAYERS`.
        blocks: one of `BLOCKS`, or numbers of flow blocks, 0 on the data side, such as "0,2".
    """

    kind: str = "lora"
    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    layers: tuple[str, ...] = LAYERS
    blocks: str = "all"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise StarflowError(f"adapter: kind must be {' or '.join(KINDS)}, not {self.kind!r}")
        if self.rank < 1:
            raise StarflowError(f"adapter: rank must be 1 or more, not {self.rank}")
        if not self.scale > 0:
            raise StarflowError(f"adapter: scale must be greater than 0, not {self.scale}")
        if not 0 <= self.dropout < 1:
            raise StarflowError(f"adapter: dropout must be in 0..1, less than 1, not {self.dropout}")
        if unknown := [name for name in self.layers if name not in LAYERS]:
            raise StarflowError(f"adapter: no layer is called {unknown[0]!r}; names are {', '.join(LAYERS)}")

    def paths(self, flow: nn.Module) -> list[str]:
        """The layers of a flow, or of a student, which has no blocks, that it means.

        Raises StarflowError if there is none, or no such block.
        """
        names = tuple(f".{name}" for name in self.layers)
        if isinstance(flow, Student):
            return [path for path in linear_layers(flow) if f".{path}".endswith(names)]
        count = len(flow.blocks)
        groups = {"all": range(count), "deep": [count - 1], "shallow": range(count - 1)}
        if self.blocks in groups:
            blocks = set(groups[self.blocks])
        else:
            try:
                blocks = {int(number) for number in self.blocks.split(",")}
            except ValueError:
                raise StarflowError(
                    f"adapter: blocks must be {', '.join(BLOCKS)} or numbers such as 0,2, not {self.blocks!r}"
                ) from None
            if wrong := blocks - set(range(count)):
                raise StarflowError(f"adapter: there is no block {min(wrong)}; this flow has 0 to {count - 1}")
        found = [
            path
            for path in linear_layers(flow)
            if path.startswith("blocks.") and int(path.split(".")[1]) in blocks and path.endswith(names)
        ]
        if not found:
            raise StarflowError(f"adapter: blocks {self.blocks!r} have none of the layers {', '.join(self.layers)}")
        return found


class KeyedDropout(nn.Module):
    """Dropout whose mask follows from `key`, so that each batch can bring a new one to a compiled step."""

    def __init__(self, share: float, number: int):
        super().__init__()
        self._share, self._number = share, number
        self._key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self._key is None:
            return x
        # The same for each layer's number, whatever order layers are computed in.
        key = self._key + mx.array([0, self._number], mx.uint32)
        return x * mx.random.bernoulli(1 - self._share, x.shape, key=key) / (1 - self._share)


def attach(flow: nn.Module, config: AdapterConfig, seed: int = 0) -> list[str]:
    """Freeze a flow and put new, trainable adapter layers on it, in place; as they are new they change nothing.

    Args:
        flow: a flow without adapters, dense or quantized.
        config: which layers, and how.
        seed: of the initial weights.

    Returns:
        The layers' paths.

    Raises:
        StarflowError: `config` means no layer of this flow, or mlx-lm is not installed.
    """
    try:
        from mlx_lm.tuner.dora import DoRALinear
        from mlx_lm.tuner.lora import LoRALinear
    except ImportError:
        raise StarflowError("training adapters needs mlx-lm: pip install mlx-lm") from None
    originals = linear_layers(flow)
    paths = config.paths(flow)
    flow.freeze()
    mx.random.seed(seed)
    kind: Any = LoRALinear if config.kind == "lora" else DoRALinear
    made = []
    for number, path in enumerate(paths):
        layer = kind.from_base(originals[path], r=config.rank, scale=config.scale)
        layer.dropout = KeyedDropout(config.dropout, number)
        layer.unfreeze(recurse=False)
        made.append((path, layer))
    replace_layers(flow, made)
    return paths


def adapter_layers(flow: nn.Module) -> dict[str, nn.Module]:
    """The layers that `attach` made, by path."""
    return {path: layer for path, layer in flow.named_modules() if isinstance(layer.get("dropout"), KeyedDropout)}


def detach(flow: nn.Module) -> None:
    """Take the layers that `attach` made off again, in place."""
    if layers := adapter_layers(flow):
        replace_layers(flow, [(path, layer.linear) for path, layer in layers.items()])


@contextmanager
def without_adapters(flow: nn.Module) -> Iterator[None]:
    """The flow as it was before `attach`, without a copy of it. It may be used within a gradient or a compiled step."""
    layers = adapter_layers(flow)
    detach(flow)
    try:
        yield
    finally:
        if layers:
            replace_layers(flow, layers.items())


@contextmanager
def dropout_key(flow: nn.Module, key: mx.array | None) -> Iterator[None]:
    """Dropout with the masks of `key`, two uint32, as far as the adapters have any; None: none."""
    dropouts = [layer.dropout for layer in adapter_layers(flow).values() if layer.dropout._share > 0]
    for dropout in dropouts:
        dropout._key = key
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout._key = None


def save_adapter(
    folder: str | Path, flow: nn.Module, config: AdapterConfig, about: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter that `attach` put on a flow: what `generate --lora`, `fuse` and `load(adapters=...)` read.

    `about` goes into `adapter_config.json` too, such as the model it was trained on. Raises StarflowError if the
    folder cannot be written.
    """
    folder = Path(folder)
    arrays = {
        f"{path}.{part}": layer[part] for path, layer in adapter_layers(flow).items() for part in KINDS[config.kind]
    }
    with transaction(folder) as new:
        write_safetensors({new.file(WEIGHTS_FILE): arrays}, arrays.items())
        content = json.dumps({**(about or {}), **asdict(config)}, indent=2) + "\n"
        new.file(CONFIG_FILE).write_text(content, encoding="utf-8")
    return folder
