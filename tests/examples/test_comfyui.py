"""The nodes for ComfyUI, loaded and run as ComfyUI does it, with its modules stubbed."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.paths import EXAMPLES

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.torch

FILES = ("comfyui/__init__.py", "comfyui/nodes.py")
WIDGETS = {"STRING": str, "INT": int, "FLOAT": float}
"""Types of inputs that are entered, not connected."""


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """ComfyUI: what its bar was told, the button that interrupts, and the nodes that it finds in the folder."""
    state = SimpleNamespace(told=[], interrupted=False)

    class ProgressBar:
        def __init__(self, total: int):
            self.total = total

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            state.told.append((value, total))

    def throw_exception_if_processing_interrupted() -> None:
        if state.interrupted:
            raise Interrupted

    modules = {name: ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management")}
    modules["comfy"].__path__ = []
    modules["comfy"].utils = modules["comfy.utils"]
    modules["comfy"].model_management = modules["comfy.model_management"]
    modules["comfy.utils"].ProgressBar = ProgressBar
    modules[
        "comfy.model_management"
    ].throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    folder = EXAMPLES / Path(FILES[0]).parent
    spec = importlib.util.spec_from_file_location("custom_nodes_starflow", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_nodes_starflow", package)
    spec.loader.exec_module(package)
    state.nodes, state.names = package.NODE_CLASS_MAPPINGS, package.NODE_DISPLAY_NAME_MAPPINGS
    yield state
    sys.modules.pop("custom_nodes_starflow.nodes")


def execute(node: type, **connected: Any) -> tuple[Any, ...]:
    """A node's outputs; inputs that are not given have their defaults."""
    values = {}
    for group in node.INPUT_TYPES().values():
        for name, (kind, *options) in group.items():
            default = kind[0] if isinstance(kind, list) else options[0]["default"] if options else None
            values[name] = connected.pop(name, default)
    assert not connected
    outputs = getattr(node(), node.FUNCTION)(**values)
    assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES)
    for kind, value in zip(node.RETURN_TYPES, outputs, strict=True):
        if kind == "IMAGE":
            assert value.dtype == torch.float32 and value.ndim == 4 and value.shape[-1] == 3
            assert value.min() >= 0 and value.max() <= 1
        elif kind in WIDGETS:
            assert isinstance(value, WIDGETS[kind])
    return outputs


def test_the_interface(comfy):
    assert set(comfy.nodes) == set(comfy.names)
    for node in comfy.nodes.values():
        inputs = {name: kind for group in node.INPUT_TYPES().values() for name, kind in group.items()}
        assert set(inspect.signature(getattr(node, node.FUNCTION)).parameters) == {"self", *inputs}
        assert node.CATEGORY == "mlx-starflow"
        assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
        for kind, *options in inputs.values():
            if isinstance(kind, str) and kind in WIDGETS:
                assert isinstance(options[0]["default"], WIDGETS[kind])


def test_a_workflow(comfy, latent_flow):
    (flow,) = execute(comfy.nodes["StarflowLoad"], model=str(latent_flow.directory))
    (image,) = execute(comfy.nodes["StarflowGenerate"], flow=flow, prompt="a cat", seed=3, images=2)
    assert image.shape == (2, 8, 8, 3) and comfy.told[-1][1] is not None
    # The very picture that the pipeline makes.
    own = flow.generate("a cat", seed=3, images=2).images
    assert (image[1] * 255).round().to(torch.uint8).numpy().tobytes() == own[1].tobytes()
    nll, error, maps = execute(comfy.nodes["StarflowScore"], flow=flow, image=image, prompt="a cat")
    scores = flow.score(own, "a cat")
    assert nll == pytest.approx(sum(each.nll for each in scores) / 2) and error > 0
    assert len(maps) == 2
    (same,) = execute(
        comfy.nodes["StarflowReprompt"], flow=flow, image=image, source="a cat", target="a dog", strength=0.0
    )
    expected = flow.reprompt(own[0], "a cat", "a dog", strength=0.0).images[0]
    assert (same[0] * 255).round().to(torch.uint8).numpy().tobytes() == expected.tobytes()


def test_the_button_that_interrupts(comfy, latent_flow):
    comfy.interrupted = True
    with pytest.raises(Interrupted):
        execute(comfy.nodes["StarflowGenerate"], flow=latent_flow)
    comfy.interrupted = False
    assert execute(comfy.nodes["StarflowGenerate"], flow=latent_flow)
