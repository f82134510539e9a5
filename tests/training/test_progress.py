"""Trainings say how far they are, and can be cancelled and gone on with; so do caches and tuning."""

from __future__ import annotations

import io

import mlx.core as mx
import pytest
from helpers.commands import message
from helpers.images import colours, write_images
from helpers.model_directories import write_image_model
from helpers.tiny_flows import tiny_case
from helpers.tiny_training import TinyData, make_model

from mlx_starflow.errors import Cancelled
from mlx_starflow.sampling import bars
from mlx_starflow.sampling.progress import Progress
from mlx_starflow.sampling.tuning import tune
from mlx_starflow.training.config import TrainingConfig, TrainingOptions
from mlx_starflow.training.data.cache.build import CacheSettings, build_cache
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.finetune import finetune
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.recipes.new_flow import NewFlow
from mlx_starflow.training.recipes.text import TextFlow

pytestmark = pytest.mark.usefixtures("uncompiled")
NAMES = ["red", "green", "blue", "black", "yellow", "white"]
CONFIG = TrainingConfig(steps=6, batch_size=4, lr=3e-3, log_every=2)
QUICK = FinetuneConfig(steps=3, batch_size=2, rank=2, validation=0.4, draws=2, samples=1, log_every=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_images(folder, colours(NAMES), [{"text": f"a {name} square"} for name in NAMES])
    return folder


class Seen:
    """A callback that remembers, and may cancel in a phase when so much of it is done."""

    def __init__(self, phase: str = "", done: int = 0):
        self.at, self.told = (phase, done), []

    def __call__(self, progress: Progress) -> None:
        self.told.append((progress.phase, progress.done, progress.total, progress.unit, progress.note))
        if (progress.phase, progress.done) == self.at:
            progress.cancel()

    def phases(self) -> list[str]:
        return list(dict.fromkeys(told[0] for told in self.told))

    def of(self, phase: str) -> list[tuple[int, int | None]]:
        return [told[1:3] for told in self.told if told[0] == phase]


def trainer(folder, **options) -> Trainer:
    return Trainer(make_model(), TinyData(), CONFIG, folder, loss=TextFlow.loss, name="mine", **options)


def test_steps_are_told(tmp_path):
    seen = Seen()
    trainer(tmp_path, callback=seen).run()
    assert seen.of("mine") == [(step, 6) for step in range(7)]
    assert {told[3] for told in seen.told} == {"step"}
    assert seen.told[0][4] == "" and "loss" in seen.told[-1][4]


def test_what_is_cancelled_is_saved_and_gone_on_with(tmp_path, capfd):
    straight = trainer(tmp_path / "straight").run()
    with pytest.raises(Cancelled):
        trainer(tmp_path / "other", callback=Seen("mine", 3)).run()
    assert "mine stopped at step 3 of 6 and is saved" in capfd.readouterr().err
    seen = Seen()
    resumed = trainer(tmp_path / "other", callback=seen).run()
    assert seen.of("mine") == [(step, 6) for step in range(3, 7)]
    assert straight.keys() == resumed.keys()
    assert all(mx.array_equal(straight[name], resumed[name]) for name in straight)


def test_what_is_cancelled_before_it_begins_does_nothing(tmp_path):
    progress = Progress()
    progress.cancel()
    run = trainer(tmp_path, progress=progress)
    with pytest.raises(Cancelled):
        run.run()
    assert run.step == 0


def test_lines_without_a_terminal(tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(bars, "SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr", stream)
    trainer(tmp_path).run()
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("mine: ")]
    assert any(line.startswith("mine: 4 of 6 step, ") and "left; " in line and "loss" in line for line in lines)
    assert "\r" not in stream.getvalue()


def test_a_finetuning(model, pictures, tmp_path):
    seen = Seen()
    finetune(model, pictures, tmp_path / "run", QUICK, callback=seen)
    assert [phase for phase in seen.phases() if phase not in ("", "batches")] == [
        *("pictures", "captions", "checksums", "scoring", "flow", "finetune", "text", "denoise", "decode"),
    ]
    assert seen.of("scoring")[-1] == (4, 4)  # two draws of two pictures
    assert seen.of("finetune") == [(step, 3) for step in range(4)]


def test_a_finetuning_that_is_cancelled(model, pictures, tmp_path):
    for phase, done in (("captions", 7), ("scoring", 2), ("finetune", 2)):
        with pytest.raises(Cancelled):
            finetune(model, pictures, tmp_path / "run", QUICK, callback=Seen(phase, done))
        assert not (tmp_path / "run/report.json").exists()
    assert (tmp_path / "run/adapter/adapter_config.json").exists()
    seen = Seen()
    finetune(model, pictures, tmp_path / "run", QUICK, callback=seen)
    assert seen.of("finetune")[0] == (2, 3) and not seen.of("pictures")
    assert (tmp_path / "run/report.json").exists()


def test_a_wrong_argument(model, pictures, tmp_path):
    assert "did you mean 'callback'" in message(finetune, model, pictures, tmp_path / "run", calback=print)
    assert "steps" in message(FinetuneConfig, step=3)


def test_a_cache_that_is_cancelled_goes_on(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_starflow.training.data.cache.encode.STEP", 1)
    settings = CacheSettings(batch_size=2)
    build_cache(pictures, tmp_path / "straight", model, settings)
    with pytest.raises(Cancelled):
        build_cache(pictures, tmp_path / "other", model, settings, callback=Seen("pictures", 4))
    seen = Seen()
    build_cache(pictures, tmp_path / "other", model, settings, callback=seen)
    assert seen.of("pictures")[0][0] == 6  # none is encoded again
    assert seen.of("captions")[-1] == (7, 7)
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_tuning():
    tiny = tiny_case("softplus")
    z = mx.random.normal(tiny.x.shape, key=mx.random.key(0))
    seen = Seen()
    tune(tiny.flow, z, tiny.text, callback=seen)
    done = seen.of("tuning")[1:]
    assert done[-1][0] == done[-1][1] and done == sorted(done)
    with pytest.raises(Cancelled):
        tune(tiny.flow, z, tiny.text, callback=Seen("tuning", 2))


def test_new_flows(model, pictures, tmp_path):
    options = TrainingOptions(steps=2, batch_size=2, log_every=1)
    for number, config in enumerate(
        (
            {"model_type": "tarflow", "img_size": 8, "patch_size": 4, "channels": 64, "blocks": 2,
             "layers_per_block": 1},
            {"model_type": "starflow", "patch_size": 1, "channels": 32, "layers_per_block": [1, 1], "head_dim": 32},
        )
    ):  # fmt: skip
        seen = Seen()
        run = NewFlow(pictures, tmp_path / str(number), config, options, str(model))
        run.run(callback=seen)
        assert seen.of("train") == [(0, 2), (1, 2), (2, 2)]
        assert bool(seen.of("captions")) == (config["model_type"] == "starflow")
