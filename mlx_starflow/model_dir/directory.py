"""Model directories: which networks one holds, their configs, read once, and loading them.

A flow's `config.json` and `model*.safetensors` lie in the directory itself; the text encoder and the autoencoder of a
flow that reads prompts lie in its folders `text_encoder` and `vae`. A network's `config.json` holds its config, its
`model_type` and, for quantized weights, `quantization`; a flow's also `pipeline`, how to sample unless told otherwise,
and what ties it to other weights, see `fingerprint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.files import exists, inside, is_folder, is_regular, read_bytes
from mlx_starflow.model_dir.adapters import STUDENT, Strengths, add_adapters
from mlx_starflow.model_dir.files import PLAN_FILE, STATISTICS_FILE, StoredConfig, load_weights
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.model_dir.hub import find_model, find_student
from mlx_starflow.model_dir.precision import Precision
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.tensor_parallel import load_part
from mlx_starflow.model_dir.weights import (
    automatic_precision,
    forget_draws,
    load_module,
    parse_dtype,
    place_weights,
    read_weights,
)
from mlx_starflow.models import itarflow, starflow, tarflow
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.models.itarflow import ITarFlow, ITarFlowConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.student import Student, StudentConfig
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.models.tarflow import PixelFlow, PixelFlowConfig, TarFlow, TarFlowConfig
from mlx_starflow.models.text_flow import TextFlow, TextFlowConfig
from mlx_starflow.models.tokenizer import Tokenizer

Network = TypeVar("Network", bound=nn.Module, covariant=True)
Config = TypeVar("Config", covariant=True)


class ConfigKind(Protocol[Config]):
    """A class of configs that are read from `config.json`."""

    def from_dict(self, content: dict[str, Any]) -> Config: ...


LICENCES = ("LICENSE", "LICENCE", "NOTICE")
"""Names, without suffix, of files that go with weights."""


class FlowKind(NamedTuple):
    """One kind of flow: its network, its config, and what makes the network's tensors of official ones."""

    network: Callable[[Any], STARFlow | PixelFlow]
    config: type[FlowConfig] | type[PixelFlowConfig]
    sanitize: Callable[[dict[str, Any]], dict[str, Any]]


FLOWS = {
    "starflow": FlowKind(STARFlow, FlowConfig, starflow.sanitize),
    "tarflow": FlowKind(TarFlow, TarFlowConfig, tarflow.sanitize),
    "itarflow": FlowKind(ITarFlow, ITarFlowConfig, itarflow.sanitize),
}
"""Flows by the `model_type` of their `config.json`."""

TEXT_FLOW = "text_flow"
"""The `model_type` of flows over text. They are no models of images: `NetworkDirectory.text_flow` opens them."""


class NetworkDirectory(Generic[Network, Config]):
    """One network on disk: a folder with `config.json`, read once, and `model*.safetensors`.

    Attributes:
        folder: where it is.
        stored, content: its `config.json`, and all that it holds.
    """

    def __init__(self, stored: StoredConfig, network: Callable[[Any], Network], config: ConfigKind[Config]):
        self.folder, self.content, self.stored = stored.folder, stored.content, stored
        self._network, self._config = network, config

    @classmethod
    def flow(cls, folder: str | Path) -> NetworkDirectory[STARFlow | PixelFlow, FlowConfig | PixelFlowConfig]:
        """The flow in a folder. Raises StarflowError if there is none, or it is of an unknown type."""
        stored = StoredConfig(folder)
        model_type = stored.content.get("model_type")
        if model_type == TEXT_FLOW:
            raise StarflowError(
                f"{stored.folder} is a model of text, which generate, score and load_text take, and nothing else"
            )
        if model_type == STUDENT:
            raise StarflowError(
                f"{stored.folder} is a student, which makes pictures with its teacher: give that as the model, and "
                f"this with --student {stored.folder}"
            )
        if not isinstance(model_type, str) or model_type not in FLOWS:
            raise StarflowError(
                f"{stored.folder / 'config.json'}: model_type {model_type!r} is not a flow's, {', '.join(FLOWS)}; "
                "convert an official checkpoint with: mlx-starflow convert flow CHECKPOINT --config YAML -o DIR"
            )
        return NetworkDirectory(stored, FLOWS[model_type].network, FLOWS[model_type].config)

    @classmethod
    def text_flow(cls, folder: str | Path) -> NetworkDirectory[TextFlow, TextFlowConfig]:
        """The flow over text in a folder. Raises StarflowError if there is none."""
        return NetworkDirectory(_stored_as(TEXT_FLOW, folder, "model of text", "train"), TextFlow, TextFlowConfig)

    @classmethod
    def student(cls, name: str | Path) -> NetworkDirectory[Student, StudentConfig]:
        """The student of a folder, see `hub.find_student`. Raises StarflowError if there is none."""
        return NetworkDirectory(_stored_as(STUDENT, find_student(name), "student", "distill"), Student, StudentConfig)

    @classmethod
    def text_encoder(cls, folder: str | Path) -> NetworkDirectory[T5Encoder, T5Config]:
        """The text encoder in a folder. Raises StarflowError if there is no `config.json`."""
        return NetworkDirectory(StoredConfig(folder), T5Encoder, T5Config)

    @classmethod
    def vae(
        cls, folder: str | Path
    ) -> NetworkDirectory[AutoencoderKL | AutoencoderWan, AutoencoderKLConfig | AutoencoderWanConfig]:
        """The autoencoder in a folder, of images or of videos. Raises StarflowError if there is no `config.json`."""
        stored = StoredConfig(folder)
        if stored.content.get("model_type") == "autoencoder_wan":
            return NetworkDirectory(stored, AutoencoderWan, AutoencoderWanConfig)
        return NetworkDirectory(stored, AutoencoderKL, AutoencoderKLConfig)

    @cached_property
    def config(self) -> Config:
        """The network's config. Raises StarflowError if `config.json` does not hold one."""
        with self._naming():
            return self._config.from_dict(self.content)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the weights are quantized, see `quantization.quantize_module`; None if they are not."""
        found = self.content.get("quantization")
        if found is not None and not isinstance(found, dict):
            raise StarflowError(f"{self.folder / 'config.json'}: quantization must hold names and values")
        return found

    def weights(self) -> dict[str, mx.array]:
        """Tensors by name, as they are stored; each is read when it is evaluated. Raises StarflowError."""
        weights = load_weights(self.folder)
        self.stored.check()
        return weights

    def new(self) -> Network:
        """The network without its weights. Raises StarflowError if `config.json` does not hold a config."""
        config = self.config
        with self._naming():
            network = self._network(config)
        forget_draws()
        return network

    def lazy(self) -> Network:
        """The network with weights that are read when they are evaluated, as they are stored. Raises StarflowError."""
        network = self.new()
        place_weights(network, self.weights(), self.folder, quantization=self.quantization)
        return network

    def load(self, dtype: str | mx.Dtype | None = None) -> Network:
        """The network, read.

        Args:
            dtype: "float32", "bfloat16" or "float16"; "auto" or None: that of `precision`.

        Raises:
            StarflowError: a file is missing or damaged, or does not fit the config.
        """
        dtype = parse_dtype(dtype) or parse_dtype(self.precision.dtype)
        return load_module(self.new(), self.weights(), self.folder, dtype, quantization=self.quantization)

    @property
    def precision(self) -> Precision:
        """What the network computes in on this machine, unless it is told."""
        of_pictures = self.content.get("model_type") in FLOWS and not self.content.get("vid_size")
        return automatic_precision(quantized_flow=of_pictures and bool(self.quantization))

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (StarflowError, ArithmeticError, TypeError, ValueError) as error:
            raise StarflowError(f"{self.folder / 'config.json'}: {one_line(error)}") from error


class ModelDirectory:
    """A model on disk: a flow and, for models that read prompts, its text encoder and its autoencoder.

    Each network's `config.json` is read once, the flow's when the directory is opened, the others' when they are asked
    for.

    Attributes:
        path: the directory.
        flow: its flow.
    """

    def __init__(self, path: str | Path):
        """Raises StarflowError if it is no model directory."""
        self.path = Path(path)
        self.flow = NetworkDirectory.flow(self.path)

    @classmethod
    def find(cls, name: str | Path, *, download: bool = True) -> ModelDirectory:
        """The directory of "demo", of a folder or of a Hugging Face repository, see `hub.find_model`.

        Raises:
            StarflowError: there is no such model, or it cannot be downloaded.
        """
        return cls(find_model(name, download=download))

    @cached_property
    def text_encoder(self) -> NetworkDirectory[T5Encoder, T5Config]:
        """Raises StarflowError if there is none."""
        return NetworkDirectory.text_encoder(self._part("text_encoder"))

    @cached_property
    def vae(self) -> NetworkDirectory[AutoencoderKL | AutoencoderWan, AutoencoderKLConfig | AutoencoderWanConfig]:
        """Raises StarflowError if there is none."""
        return NetworkDirectory.vae(self._part("vae"))

    def _part(self, name: str) -> Path:
        if not is_folder(self.path / name):
            raise StarflowError(f"{self.path} is a flow alone: generating needs its {name}/ folder too")
        self.flow.stored.check()
        return self.path / name

    @property
    def reads_prompts(self) -> bool:
        """Whether the flow is conditioned on text."""
        return bool(self.flow.content.get("model_type") == "starflow" and self.flow.content.get("txt_size"))

    def has(self, part: str) -> bool:
        """Whether there is a network beside the flow, "text_encoder", "vae" or `OWN_STUDENT`."""
        return is_regular(self.path / part / "config.json")

    @property
    def licences(self) -> list[str]:
        """Names of the files that say what may be done with the weights."""
        return sorted(path.name for path in self.path.iterdir() if path.is_file() and path.stem.upper() in LICENCES)

    @property
    def pipeline(self) -> dict[str, Any]:
        """How the model samples unless told otherwise: settings by name, those that its `config.json` has.

        Raises StarflowError if it holds something else there.
        """
        settings = self.flow.content.get("pipeline", {})
        if not isinstance(settings, dict):
            raise StarflowError(f"{self.path / 'config.json'}: pipeline must hold names and values")
        return dict(settings)

    @property
    def plan_file(self) -> Path:
        return self.path / PLAN_FILE

    @property
    def statistics_file(self) -> Path:
        return self.path / STATISTICS_FILE

    def load_flow(
        self,
        dtype: str | mx.Dtype | None = None,
        adapters: Strengths = (),
        group: mx.distributed.Group | None = None,
        quantize: int | str | None = None,
    ) -> STARFlow | PixelFlow:
        """`directory.load_flow` of this directory; `quantize` as `quantize_module` takes it."""
        if group is None:
            flow = self.flow.load(dtype)
            if quantize is not None:
                quantize_module(flow, quantize)
                read_weights(flow)
            add_adapters(flow, adapters, self.path)
            return flow
        if quantize is not None:
            raise StarflowError("a flow that is split over ranks is not quantized as it is read: quantize the model")
        if adapters:
            raise StarflowError("adapters cannot be split over ranks: fuse them into the model first")
        return load_part(
            self.flow.lazy(), self.path, parse_dtype(dtype) or parse_dtype(self.flow.precision.dtype), group
        )


@checked
def load_flow(
    path_or_id: str | Path,
    dtype: str | mx.Dtype | None = None,
    adapters: Strengths = (),
    group: mx.distributed.Group | None = None,
) -> STARFlow | PixelFlow:
    """The flow of a model directory.

    Args:
        path_or_id: "demo", a model directory or a Hugging Face repository of one (see `find_model`).
        dtype: "float32", "bfloat16" or "float16"; "auto" or None: what `precision.automatic` says.
        adapters: folders of adapters with their strengths (1: as trained), see `adapters.add_adapters`.
        group: processes that compute it together, each with a part of it, see `tensor_parallel`.

    Raises:
        StarflowError: there is no such model, it is incomplete, damaged or of an unknown type, or an adapter does not
            fit it, or it cannot be split over the group.
    """
    parse_dtype(dtype)  # a mistake in it comes before a download
    return ModelDirectory.find(path_or_id).load_flow(dtype, adapters, group)


def _stored_as(model_type: str, folder: str | Path, what: str, command: str) -> StoredConfig:
    """The config in a folder. Raises StarflowError unless it has this `model_type`, which users call `what`, and which
    a command writes."""
    stored = StoredConfig(folder, f"a {what}, such as `mlx-starflow {command}` writes")
    if (found := stored.content.get("model_type")) != model_type:
        raise StarflowError(f"{stored.folder} is no {what}: its model_type is {found!r}, not {model_type!r}")
    return stored


def load_student(
    path: str | Path,
    teacher: ModelDirectory | None = None,
    dtype: str | mx.Dtype | None = None,
    adapters: Strengths = (),
) -> Student:
    """The student in a folder, or that of a model, "demo" among them; `dtype` as in `load_flow`.

    Args:
        teacher: the model that it is to be used with; None: any.
        adapters: folders of adapters of students with their strengths.

    Raises:
        StarflowError: there is none, it is damaged, it has learned from other weights than the teacher's, or an adapter
            does not fit it.
    """
    directory = NetworkDirectory.student(path)
    if teacher is not None and directory.config.teacher != fingerprint(teacher.path):
        raise StarflowError(
            f"the student {path} has learned from other weights than those of {teacher.path}: give the model that it "
            "was distilled from"
        )
    student = directory.load(dtype)
    add_adapters(student, adapters, directory.folder)
    return student


def load_text_flow(path_or_id: str | Path, dtype: str | mx.Dtype | None = None, *, download: bool = True) -> TextFlow:
    """The flow of a model of text; arguments as for `load_flow`. Raises StarflowError, also if it is another model."""
    parse_dtype(dtype)
    return NetworkDirectory.text_flow(find_model(path_or_id, download=download)).load(dtype)


def is_text_model(name: str | Path) -> bool:
    """Whether this is the directory of a model of text; a name of the Hub is, if the model is on this machine."""
    try:
        return StoredConfig(find_model(name, download=False)).content.get("model_type") == TEXT_FLOW
    except StarflowError:
        return False


def load_text_encoder(directory: str | Path, dtype: str | mx.Dtype | None = None) -> tuple[T5Encoder, Tokenizer]:
    """The text encoder in a folder with `spiece.model` beside its weights; `dtype` as in `load_flow`.

    Raises:
        StarflowError: a file is missing or damaged, or tokenizer and encoder do not belong together.
    """
    return read_text_encoder(NetworkDirectory.text_encoder(directory), dtype)


def read_text_encoder(
    directory: NetworkDirectory[T5Encoder, T5Config], dtype: str | mx.Dtype | None = None
) -> tuple[T5Encoder, Tokenizer]:
    """`load_text_encoder` of a directory that has been opened."""
    return directory.load(dtype), read_tokenizer(directory.folder / "spiece.model", directory.config)


def read_tokenizer(path: Path, config: T5Config) -> Tokenizer:
    """A text encoder's tokenizer. Raises StarflowError if it is unusable or has more tokens than the encoder."""
    if exists(inside(path.parent, path.name)):
        read_bytes(path)  # it is a regular file, and not too large
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise StarflowError(
            f"{path} has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}; "
            "use the spiece.model of this checkpoint"
        )
    return tokenizer


def load_vae(directory: str | Path, dtype: str | mx.Dtype | None = None) -> AutoencoderKL | AutoencoderWan:
    """The autoencoder in a folder, of images or of videos; `dtype` as in `load_flow`.

    Raises:
        StarflowError: a file is missing or damaged, or the folder holds another kind of model.
    """
    return NetworkDirectory.vae(directory).load(dtype)
