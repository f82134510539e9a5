"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before MLX loads a BLAS: each worker takes its share of the CPUs.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

import mlx.core as mx
import pytest
from helpers.asked import AskedPrecision
from helpers.golden import Golden, load_golden
from helpers.images import write_gradients
from helpers.model_directories import write_class_model, write_image_model, write_trained_model
from helpers.tiny_flows import FAMILIES, TinyCase, tiny_case

from mlx_starflow import cpu
from mlx_starflow.model_dir import weights
from mlx_starflow.pipelines import ClassPipeline, ImagePipeline, Pipeline, load, load_class_labels
from mlx_starflow.sampling.decoder import BlockDecoder

MOST_WORKERS = 4

DTYPES = ("float32", "auto", "auto-gpu")
"""What `--dtype` takes: what networks that are loaded without a precision compute in."""

own_device, own_chip = weights.device, weights.chip_generation
"""What MLX computes on, whatever `--dtype` makes of it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlx-starflow")
    group.addoption("--device", choices=("cpu", "gpu"), help="what MLX computes on; its own default otherwise")
    group.addoption(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="what networks compute in where a test does not say: float32, which most bounds are for; auto, what this "
        "machine would choose; auto-gpu, what a Mac would, computed on whatever is here",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose device and precision before any test, in every worker."""
    if config.option.device:
        try:
            mx.set_default_device(getattr(mx, config.option.device))
            mx.eval(mx.ones(1) + 1)
        except (RuntimeError, ValueError) as error:
            raise pytest.UsageError(f"--device {config.option.device}: MLX has none here ({error})") from None
    if config.option.dtype == "auto-gpu":
        weights.device, weights.chip_generation = lambda: "metal", lambda: 1
    elif config.option.dtype == "float32" and own_device() != "cpu":
        weights.device = lambda: "cpu"
    if config.pluginmanager.hasplugin("cacheprovider"):
        config.pluginmanager.register(AskedPrecision(config))


@pytest.fixture
def chosen_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Precisions are chosen as users get them here, whatever `--dtype` says."""
    monkeypatch.setattr(weights, "device", own_device)
    monkeypatch.setattr(weights, "chip_generation", own_chip)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in a process for each CPU, at most four, unless `-n` says otherwise; named files in one."""
    options = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if options.numprocesses is None and not (named or options.usepdb or options.collectonly):
        options.numprocesses = min(os.cpu_count() or 1, MOST_WORKERS)
    if options.numprocesses and options.dist == "no":
        options.dist = "loadfile"  # fixtures of a module are made once


@pytest.fixture(scope="session")
def golden() -> Callable[..., Golden]:
    """`golden(case)` or `golden(case, mx.bfloat16)`; do not change its flow."""
    return load_golden


@pytest.fixture(params=list(FAMILIES))
def tiny(request: pytest.FixtureRequest) -> TinyCase:
    """A tiny flow of each family; each test gets its own."""
    return tiny_case(request.param)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Most tests need no compiled step, and building its kernels takes seconds on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def in_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling computes in MLX, as on a Mac, even where there is C++ for it."""
    monkeypatch.setattr(cpu, "has_fast_networks", lambda: False)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the network is evaluated, by the names of `BlockDecoder`'s methods, as it happens."""
    made: list[str] = []
    for name in ("invert", "sweep", "predict"):
        whole = getattr(BlockDecoder, name)
        monkeypatch.setattr(
            BlockDecoder, name, lambda *args, n=name, whole=whole, **options: made.append(n) or whole(*args, **options)
        )
    return made


@pytest.fixture(scope="session")
def latent_flow(tmp_path_factory: pytest.TempPathFactory) -> ImagePipeline:
    """A text-to-image model of 16 tokens."""
    return load(write_image_model(tmp_path_factory.mktemp("text") / "model"))


@pytest.fixture(scope="session")
def pixel_flow(tmp_path_factory: pytest.TempPathFactory) -> ClassPipeline:
    """A TarFlow of 3 classes, trained with Gaussian noise."""
    return load_class_labels(write_class_model(tmp_path_factory.mktemp("classes") / "model"))


@pytest.fixture(scope="session")
def captioned_gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that share captions."""
    return write_gradients(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory, captioned_gradients: Path) -> Path:
    """The directory of a model that has learned something of these images; do not change it."""
    return write_trained_model(tmp_path_factory.mktemp("trained") / "model", captioned_gradients)


@pytest.fixture(params=["latents", "pixels"])
def model(request: pytest.FixtureRequest, latent_flow: ImagePipeline, pixel_flow: ClassPipeline) -> Pipeline:
    """Both of them."""
    return latent_flow if request.param == "latents" else pixel_flow
