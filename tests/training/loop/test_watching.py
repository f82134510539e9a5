"""What can be seen of a training: sheets of samples, other programs' windows, weights to use before the end."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from training.loop.test_config import held_out
from training.loop.test_trainer import CONFIG, Crash, Stops, crash, make_trainer

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.loop import reporting
from mlx_starflow.training.loop.reporting import check_reporter, open_reporter, plain_numbers
from mlx_starflow.training.loop.timing import duration
from mlx_starflow.training.loop.watch import CELL, SampleSheet
from mlx_starflow.training.recipes.text import TextFlow

pytestmark = pytest.mark.usefixtures("uncompiled")


def test_a_sheet_has_labels():
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue", "black")]
    sheet = SampleSheet(images, ["a " * 200, "ein Hund, eine Fliege: \u72ac", "", "b"], columns=2).draw()
    assert sheet.size[0] == 2 * CELL + 2
    height = (sheet.size[1] - 2) // 2
    assert height == 30 + 3 * 14 + 4  # the longest label is cut to three lines
    for index, colour in enumerate(("red", "green", "blue", "black")):
        place = index % 2 * (CELL + 2) + CELL // 2, index // 2 * (height + 2) + 15
        assert sheet.getpixel(place) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    label = np.asarray(sheet)[31 : height - 2, :CELL]
    assert label.min() < 100 and (label == 255).any()


def test_the_time_of_the_runs_before_counts(tmp_path):
    halves = replace(CONFIG, save_steps=4, log_every=1)
    with pytest.raises(Crash):
        make_trainer(tmp_path, halves, Stops(6, crash)).run()
    path = tmp_path / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "elapsed": 1000.0 + row["elapsed"]}) + "\n" for row in rows))
    make_trainer(tmp_path, halves).run()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(row["elapsed"] >= 1000 for row in rows)


def test_the_weights_of_each_checkpoint_are_published(tmp_path):
    """The average, and with validation what did best."""
    given: list[dict[str, mx.array]] = []
    trainer = make_trainer(tmp_path / "a", replace(CONFIG, save_steps=5), publish=lambda weights: given.append(weights))
    final = trainer.run()
    assert len(given) == 2 and given[1].keys() == final.keys()
    assert all(mx.array_equal(given[1][name], final[name]) for name in final)
    given.clear()
    config = replace(CONFIG, save_steps=1, validate_every=1, lr=0.5)
    trainer = make_trainer(
        tmp_path / "b", config, validation=held_out(), nll=TextFlow.nll, publish=lambda weights: given.append(weights)
    )
    best = trainer.run()
    assert len(given) == 10 and all(mx.array_equal(given[-1][name], best[name]) for name in best)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  the format that is read below

    config = replace(CONFIG, report_to="tensorboard", log_every=5, watch_every=10)
    make_trainer(tmp_path, config, samples=lambda model: [Image.new("RGB", (8, 8), "red")]).run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found: dict[str, dict[int, float]] = {}
    pictures = []
    for file in (tmp_path / "tensorboard").iterdir():
        content = file.read_bytes()
        while content:  # length, its checksum, an event, its checksum
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures.append((value.tag, event.step))
                else:
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    assert pictures == [("samples", 10)]
    assert found["loss"] == pytest.approx({row["step"]: row["loss"] for row in rows})
    assert "memory_gb" in found and "unit" not in found and "elapsed" not in found


def test_wandb(tmp_path, monkeypatch):
    """With a stand-in: what is logged, under which number, and that nobody is asked for a login."""
    calls: list[tuple[str, object]] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((str(step), values)), finish=lambda: calls.append(("finish", None))
    )
    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace(name="wandb")  # type: ignore[assignment]  # `find_spec` wants one
    module.api = SimpleNamespace(api_key=None)  # type: ignore[attr-defined]
    module.Image = lambda path: Path(path).name  # type: ignore[attr-defined]
    module.init = lambda **options: calls.append(("init", options)) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    config = replace(CONFIG, report_to="wandb", log_every=5, watch_every=10)
    make_trainer(tmp_path / "rex", config, samples=lambda model: [Image.new("RGB", (8, 8), "red")]).run()
    (name, options), *logged, (last, _) = calls
    assert (name, last) == ("init", "finish")
    assert options["mode"] == "offline" and options["name"] == "rex" and options["config"]["steps"] == 10
    assert [step for step, _ in logged] == ["5", "10", "10"]
    assert logged[-1][1] == {"samples": "step-00000010.png"}
    again = open_reporter("wandb", tmp_path / "rex", 10, {})
    assert calls[-1][1]["id"] == options["id"] and again is not None

    def refuse(**options: object) -> None:
        raise RuntimeError("no\nlogin")

    module.init = refuse  # type: ignore[attr-defined]
    with pytest.raises(StarflowError, match=r"^--report-to wandb: no; wandb login, or WANDB_MODE=offline"):
        open_reporter("wandb", tmp_path, 0, {})


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_before_any_work(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    with pytest.raises(StarflowError, match=f"--report-to {kind} needs {reporting.PACKAGES[kind]}: pip install"):
        make_trainer(tmp_path / "run", replace(CONFIG, report_to=kind))
    assert not (tmp_path / "run").exists()
    check_reporter(None)


def test_what_is_worth_a_curve():
    line = {
        "step": 3,
        "loss": 1.5,
        "best": True,
        "unit": "x",
        "standard_error": None,
        "elapsed": 2.0,
        "epoch": 1,
        "n": 2,
    }
    assert plain_numbers(line) == {"loss": 1.5, "n": 2.0}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(12, "12 s"), (89, "89 s"), (100, "2 min"), (3590, "1 h"), (12000, "3 h 20 min"), (400000, "4 d 15 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
