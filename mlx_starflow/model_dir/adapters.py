"""Adapters in use: low-rank changes of a flow's linear layers, added to it as it is loaded, or fused into its weights.

An adapter is a folder with `adapter_config.json` and `adapters.safetensors`, which `training.adapters` writes. Of a
layer y = W x + b it holds a `[in, r]` and b `[r, out]`, and for DoRA (arXiv 2402.09353) the rows' magnitudes m `[out]`:

    LoRA    W' = W + s (a b)^T                                (arXiv 2106.09685)
    DoRA    W' = n (W + s (a b)^T),   n = m / |W + s (a b)^T|, row by row

Its strength t makes W + t (W' - W) of the layer, and the changes of several adapters add up. In all cases that is
(1 + g) W + (a b)^T with one row gain g and one pair a, b, which is what `AdaptedLinear` computes.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import exists, expanded, inside, is_folder, read_json
from mlx_starflow.model_dir.files import read_safetensors
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.model_dir.hub import fetch, is_repository
from mlx_starflow.model_dir.quantization import QuantizedLinear
from mlx_starflow.model_dir.transaction import settle
from mlx_starflow.model_dir.weights import check_floating
from mlx_starflow.models.student import Student
from mlx_starflow.models.trees import flattened

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapters.safetensors"

FINGERPRINT = "base_fingerprint"
"""What an adapter's config calls the fingerprint of the model that it was trained on."""

OF = "of"
"""What an adapter's config calls the kind of network that it changes: `STUDENT`, or nothing where that is a flow."""

STUDENT = "student"
"""That of what has learned from a flow. It is the `model_type` of students, too."""

KINDS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}
"""What each kind of adapter holds of a layer."""

MOST_SCALE = 1e6
"""Below which an adapter's scale lies; usual ones are about 1 to 20."""

Strengths = Sequence[tuple[str | Path, float]]
"""Folders or Hub repositories of adapters, each with its strength: 1 is as trained, 0 nothing."""


class AdaptedLinear(nn.Module):
    """A linear layer, dense or quantized, with the sum of some adapters: see the module's text.

    Attributes:
        linear: the layer as it was.
        lora_a, lora_b: `[in, R]` and `[R, out]`, R the sum of the adapters' ranks.
        gain: `[out]`, if one of them is DoRA.
    """

    lora_a: mx.array
    lora_b: mx.array
    gain: mx.array

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def add(self, lora_a: mx.array, lora_b: mx.array, gain: mx.array | None) -> None:
        """Add a change: `gain` W + (lora_a lora_b)^T."""
        if "lora_a" in self:
            lora_a = mx.concatenate([self.lora_a, lora_a], axis=1)
            lora_b = mx.concatenate([self.lora_b, lora_b])
        self.lora_a, self.lora_b = lora_a, lora_b
        if gain is not None:
            self.gain = self.gain + gain if "gain" in self else gain

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        change = (x @ self.lora_a) @ self.lora_b
        if "gain" in self:
            change = change + self.gain * (y - self.linear.bias if "bias" in self.linear else y)
        return y + change.astype(y.dtype)

    def fuse(self, *, dequantize: bool = False) -> nn.Module:
        """One linear layer that does the same. A quantized one is quantized again, unless `dequantize`."""
        weight = dense_weight(self.linear)
        fused = weight + (self.lora_a.astype(mx.float32) @ self.lora_b.astype(mx.float32)).T
        if "gain" in self:
            fused = fused + self.gain.astype(mx.float32)[:, None] * weight
        outputs, inputs = fused.shape
        made = nn.Linear(inputs, outputs, bias="bias" in self.linear)
        if "bias" in self.linear:
            made.bias = self.linear.bias
        quantized = isinstance(self.linear, nn.QuantizedLinear)
        made.weight = fused.astype(_dtype(self.linear))
        if not quantized or dequantize:
            return made
        settings = {key: getattr(self.linear, key) for key in ("group_size", "bits", "mode")}
        return QuantizedLinear.of(nn.QuantizedLinear.from_linear(made, **settings))


def dense_weight(linear: nn.Module) -> mx.array:
    """The weight of a linear layer, quantized or not, float32 `[out, in]`."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight.astype(mx.float32)
    settings = {key: getattr(linear, key) for key in ("group_size", "bits", "mode")}
    return mx.dequantize(linear.weight, linear.scales, linear.get("biases"), **settings, dtype=mx.float32)


def _dtype(linear: nn.Module) -> mx.Dtype:
    """What a layer computes in."""
    array = linear.scales if isinstance(linear, nn.QuantizedLinear) else linear.weight
    return array.dtype if mx.issubdtype(array.dtype, mx.floating) else mx.float32


def linear_layers(flow: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter may change, by path, in the flow's order; of adapted ones the originals."""
    layers = flattened(flow.leaf_modules(), is_leaf=nn.Module.is_module)
    linear = {path: layer for path, layer in layers if isinstance(layer, nn.Linear | nn.QuantizedLinear)}
    return {path.removesuffix(".linear"): layer for path, layer in linear.items()}


def replace_layers(flow: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Put other layers in their places, by path."""
    flow.update_modules(tree_unflatten(list(layers)))


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder.

    Attributes:
        name: of the folder.
        kind: "lora" or "dora".
        scale: s of the module's text.
        layers: tensors of each layer by path: `lora_a`, `lora_b` and, for DoRA, `m`.
        config: all of `adapter_config.json`.
    """

    name: str
    kind: str
    scale: float
    layers: dict[str, dict[str, mx.array]]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Adapter:
        """Read one, a folder's or a Hub repository's.

        Raises StarflowError if it is missing, damaged or of an unknown kind.
        """
        name, folder = str(folder), expanded(folder)
        if not exists(folder) and is_repository(name):
            folder = fetch(name, [CONFIG_FILE, WEIGHTS_FILE], note=" (there is no folder of that name)")
        settle(folder)
        if not exists(folder / CONFIG_FILE):
            what = "holds no " + CONFIG_FILE if is_folder(folder) else "is not a folder"
            raise StarflowError(f"{folder} {what}: give the folder of an adapter, such as finetune's RUN/adapter")
        config = read_json(inside(folder, CONFIG_FILE))
        kind, scale = config.get("kind"), config.get("scale")
        number = scale if isinstance(scale, int | float) and not isinstance(scale, bool) else math.inf
        if not isinstance(kind, str) or kind not in KINDS or not abs(number) < MOST_SCALE:
            raise StarflowError(
                f"{folder / CONFIG_FILE}: an adapter of mlx-starflow has a kind, {' or '.join(KINDS)}, and a scale; "
                f"this one has {repr(kind)[:50]} and {repr(scale)[:50]}"
            )
        layers: dict[str, dict[str, mx.array]] = {}
        tensors = read_safetensors(inside(folder, WEIGHTS_FILE))
        check_floating({name: array.dtype for name, array in tensors.items()}, folder / WEIGHTS_FILE)
        for name, array in tensors.items():
            path, _, part = name.rpartition(".")
            layers.setdefault(path, {})[part] = array
        if not layers:
            raise StarflowError(f"{folder / WEIGHTS_FILE} holds no layer: train the adapter again")
        for path, parts in layers.items():
            if wrong := set(parts) ^ set(KINDS[kind]):
                raise StarflowError(
                    f"{folder / WEIGHTS_FILE}: a {kind} adapter has {', '.join(KINDS[kind])} of each layer; "
                    f"{path} does not go with that: {', '.join(sorted(wrong))}"
                )
        return cls(str(folder), kind, float(number), layers, config)

    @property
    def of_student(self) -> bool:
        """Whether it changes a student, and not a flow."""
        return self.config.get(OF) == STUDENT

    def check(self, flow: nn.Module) -> None:
        """Raise StarflowError unless it fits a flow, naming the first layer, in the flow's order, that does not.

        So it does for a student, which takes adapters of students alone.
        """
        if self.of_student and not isinstance(flow, Student):
            raise StarflowError(
                f"{self.name} is an adapter of a student, and changes no model: give it to generate with that student "
                f"(--student DIR --lora {self.name} 1)"
            )
        if isinstance(flow, Student) and not self.of_student:
            raise StarflowError(
                f"{self.name} is an adapter of a model, and changes no student: teach a student its style with "
                "mlx-starflow distill --lora"
            )
        present, what = linear_layers(flow), "student" if self.of_student else "model"
        for path in [path for path in present if path in self.layers] + sorted(set(self.layers) - set(present)):
            if path not in present:
                raise StarflowError(f"{self.name} does not fit this {what}, which has no linear layer {path}")
            outputs, inputs = _shape(present[path])
            parts = self.layers[path]
            a, b = parts["lora_a"].shape, parts["lora_b"].shape
            fits = len(a) == len(b) == 2 and a[1] == b[0] and parts.get("m", mx.zeros(b[-1:])).shape == b[-1:]
            if not fits or (b[1], a[0]) != (outputs, inputs):
                found = f"[{b[-1]}, {a[0]}]" if fits else f"{list(a)} and {list(b)}"
                raise StarflowError(
                    f"{self.name} does not fit this {what}: {path} is [{outputs}, {inputs}] here and {found} there; "
                    f"use it with the {what} it was trained on"
                )

    def check_base(self, directory: Path) -> None:
        """Warn if the adapter says that it was trained on other weights than a model directory's."""
        trained_on = self.config.get(FINGERPRINT)
        if isinstance(trained_on, str) and trained_on != fingerprint(directory):
            warnings.warn(
                f"the adapter {self.name} was trained on other weights than those in {directory}: it may not suit them",
                stacklevel=3,
            )

    def digest(self) -> str:
        """Tells one adapter's numbers from another's."""
        found = hashlib.sha256(f"{self.kind} {self.scale!r}".encode())
        for path, parts in sorted(self.layers.items()):
            for name, array in sorted(parts.items()):
                found.update(f"{path}.{name}".encode())
                found.update(np.array(array.astype(mx.float32)).tobytes())
        return found.hexdigest()[:16]

    def change(self, path: str, linear: nn.Module, strength: float) -> tuple[mx.array, mx.array, mx.array | None]:
        """What this adapter adds to a layer, for `AdaptedLinear.add`."""
        parts = self.layers[path]
        a, b = parts["lora_a"].astype(mx.float32), self.scale * parts["lora_b"].astype(mx.float32)
        gain = None
        if self.kind == "dora":
            gain = parts["m"].astype(mx.float32) / mx.linalg.norm(dense_weight(linear) + (a @ b).T, axis=1)
            b, gain = b * gain, strength * (gain - 1)
        dtype = _dtype(linear)
        return a.astype(dtype), (strength * b).astype(dtype), None if gain is None else gain.astype(dtype)


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs)."""
    outputs, inputs = linear.weight.shape
    return outputs, inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs


def for_flow_and_student(adapters: Strengths) -> tuple[Strengths, Strengths]:
    """Adapters of a flow, and adapters of its student. Raises StarflowError if one cannot be read."""
    of_student = [each for each in adapters if Adapter.read(each[0]).of_student]
    return [each for each in adapters if each not in of_student], of_student


def add_adapters(flow: nn.Module, adapters: Strengths, directory: Path | None = None) -> list[Adapter]:
    """Add adapters to a flow or a student, in place; what they change adds up. One of strength 0 changes nothing.

    Warns about adapters that were trained on other weights than those in `directory`, the flow's, if it is given.

    Returns:
        What was read.

    Raises:
        StarflowError: an adapter is missing, damaged, or of another model; the flow is unchanged then.
    """
    for folder, strength in adapters:
        if not math.isfinite(float(strength)):
            raise StarflowError(f"the strength of the adapter {folder} must be a number, such as 1, not {strength:g}")
    read = [(Adapter.read(folder), float(strength)) for folder, strength in adapters]
    for adapter, _ in read:
        adapter.check(flow)
        if directory is not None:
            adapter.check_base(directory)
    originals = linear_layers(flow)
    adapted = {path: layer for path, layer in flow.named_modules() if isinstance(layer, AdaptedLinear)}
    for adapter, strength in read:
        if strength == 0:
            continue
        for path in adapter.layers:
            layer = adapted.setdefault(path, AdaptedLinear(originals[path]))
            layer.add(*adapter.change(path, originals[path], strength))
    for path, layer in adapted.items():
        parts = [layer.lora_a, layer.lora_b, *([layer.gain] if "gain" in layer else [])]
        if not all(mx.isfinite(part).all().item() for part in parts):
            names = ", ".join(adapter.name for adapter, _ in read)
            raise StarflowError(
                f"the change of {path} by {names} is not finite: it is damaged, or its strength too large"
            )
    replace_layers(flow, adapted.items())
    return [adapter for adapter, _ in read]


def fuse_adapters(flow: nn.Module, *, dequantize: bool = False) -> list[str]:
    """Make ordinary layers of the adapted ones, in place; returns their paths. See `AdaptedLinear.fuse`."""
    adapted = [(path, layer) for path, layer in flow.named_modules() if isinstance(layer, AdaptedLinear)]
    replace_layers(flow, [(path, layer.fuse(dequantize=dequantize)) for path, layer in adapted])
    return [path for path, _ in adapted]
