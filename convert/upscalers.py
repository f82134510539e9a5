"""Files of upscalers, as others have published them -> networks of `models.upscalers`.

A file is a `.pth` of `torch.save` or a `.safetensors`; which network it is of, and how often that enlarges, its
tensors' names and shapes say. Averaged weights are taken where there are some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_starflow.convert.common import open_checkpoint
from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.errors import StarflowError, one_line, printable
from mlx_starflow.media.files import checksum, exists, is_regular
from mlx_starflow.model_dir.weights import cast_weights, check_floating, forget_draws, load_module, parameters
from mlx_starflow.models.upscalers import ARCHITECTURES, UpscalingNetwork

PREFIXES = ("module.", "_orig_mod.", "params_ema.", "params.", "state_dict.", "net_g.", "generator.", "model.")
"""That trainings put before the names of all tensors."""

_LISTED = re.compile(r"model\.\d+\.")
"""How names begin that ESRGAN gave its layers: nothing to take off."""


@dataclass(frozen=True)
class UpscalerFile:
    """A file of an upscaler that has been opened; its numbers are not read yet.

    Attributes:
        path: of the file.
        network: newly made.
        tensors: under the network's names, in PyTorch's layout.
    """

    path: Path
    network: UpscalingNetwork
    tensors: Mapping[str, Tensor]

    def read(self, dtype: mx.Dtype = mx.float32) -> UpscalingNetwork:
        """The network with its weights, which are read in float32 and kept in `dtype`.

        Raises:
            StarflowError: a tensor cannot be read, is missing or one too many, has another shape than the others ask
                for, or holds what is no finite number.
        """
        network = self.network
        try:
            # float64 exists on the CPU alone, and so do some numbers of 8 bits.
            with mx.stream(mx.cpu):
                read = {name: tensor.read().astype(mx.float32) for name, tensor in self.tensors.items()}
                weights = network.sanitize(read)
                expected = {name: parameter.shape for name, parameter in parameters(network).items()}
                _check(weights, expected)
                finite = {name: mx.isfinite(weight).all() for name, weight in weights.items()}
                mx.eval(weights, finite)
        except (RuntimeError, ValueError, StarflowError) as error:
            raise StarflowError(f"{self.path} cannot be read as {network.architecture}: {one_line(error)}") from None
        if bad := next((name for name in finite if not finite[name].item()), None):
            raise StarflowError(f"{self.path} is damaged: {bad} holds what is no finite number")
        load_module(network, weights, self.path, mx.float32)
        if dtype != mx.float32:
            cast_weights(network, dtype)
            mx.eval(network.parameters())
        return network

    @property
    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal digits. Raises StarflowError."""
        return checksum(self.path)


def open_upscaler(path: str | Path) -> UpscalerFile:
    """Find out which network a file is of.

    Raises:
        StarflowError: it is missing, damaged, or of no network of `models.upscalers`.
    """
    path = Path(path)
    if not is_regular(path):
        raise StarflowError(f"{path} is no file: give a .pth or .safetensors file of an upscaler's weights")
    tensors = _unprefixed(open_checkpoint(path, ema=True).tensors)
    architecture = next((each for each in ARCHITECTURES if each.recognizes(tensors)), None)
    if architecture is None:
        names = ", ".join(printable(name) for name in list(tensors)[:2])
        raise StarflowError(
            f"{path} is no upscaler that can be read, such as Real-ESRGAN's or SPAN's: it has the tensors {names}, ..."
        )
    try:
        named: dict[str, Tensor] = {}
        for source, name in architecture.sources(tensors).items():
            if name in named:
                raise StarflowError(f"the tensor {printable(name)} is there twice, under two names")
            named[name] = tensors[source]
        check_floating({printable(name): tensor.dtype for name, tensor in named.items()}, path)
        network = architecture.of({name: tensor.shape for name, tensor in named.items()})
    except StarflowError as error:
        if str(error).startswith(str(path)):
            raise
        raise StarflowError(f"{path} cannot be read as {architecture.architecture}: {error}") from None
    forget_draws()
    return UpscalerFile(path, network, named)


def is_upscaler(path: Path) -> bool:
    """Whether a name may be that of an upscaler's file: a checkpoint's, and there is one."""
    return path.suffix.lower() in (".pth", ".pt", ".safetensors") and exists(path) and is_regular(path)


def _unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what stands before all of their names."""
    out = dict(tensors)
    while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in out)), None):
        if not out or (prefix == "model." and any(map(_LISTED.match, out))):
            break
        out = {name.removeprefix(prefix): tensor for name, tensor in out.items()}
    return out


def _check(weights: Mapping[str, mx.array], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StarflowError unless there is each tensor, no other, and of its shape."""
    for name, shape in expected.items():
        if name not in weights:
            raise StarflowError(f"the tensor {name} is missing: is the file complete?")
        if weights[name].shape != shape:
            raise StarflowError(f"the tensor {name} does not fit the others: {weights[name].shape}, not {shape}")
    if extra := next((name for name in weights if name not in expected), None):
        raise StarflowError(f"it holds a tensor that the network has no place for: {printable(extra)}")
