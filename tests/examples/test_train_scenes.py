"""The scripts that train and judge the embedded model of scenes, in tiny."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers.examples import example_module, run_example
from helpers.paths import EXAMPLES
from helpers.scenes import write_sprites

from mlx_starflow import load

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data, and a finished tiny run."""
    import train_scenes

    data, out = write_sprites(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("run")
    train_scenes.main([str(data), str(out), "--tiny", "--pack", str(out / "packed")])
    return data, out


def test_a_tiny_model_is_trained_and_draws(folders):
    _, out = folders
    pipe = load(out / "model")
    result = pipe.generate("two foxes on grass", seed=1)
    assert result.images[0].size == (128, 128)
    assert list((out / "samples").glob("*.png")) and list((out / "autoencoder").glob("*.png"))


def test_dense_weights(folders):
    import train_scenes

    data, out = folders
    train_scenes.main([str(data), str(out), "--tiny", "--export", "--dense"])
    small, dense = (load(out / name) for name in ("model", "dense"))
    assert small.model.flow.quantization and not dense.model.flow.quantization
    assert small.encode_prompts(["a fox"]).shape == dense.encode_prompts(["a fox"]).shape


@pytest.mark.slow
def test_training_of_a_latent_flow(folders, tmp_path):
    run_example("train_latent_flow.py", folders[0], tmp_path, "--steps", 1, "--scenes", 16)
    flow = load(tmp_path / "model").flow
    assert flow.config.patch_size == 1 and flow.config.img_size == 16


def test_packed_weights_make_the_same_model(folders, tmp_path):
    import train_scenes

    data, out = folders
    assert all(path.stat().st_size < 16_000_000 for path in (out / "packed").iterdir())
    train_scenes.main([str(data), str(tmp_path), "--tiny", "--export", "--unpack", str(out / "packed")])
    ours, other = (load(path / "model").generate("a fox", seed=1).latents for path in (out, tmp_path))
    assert np.abs(np.array(ours) - np.array(other)).max() < 0.1


def test_packed_weights_can_be_trained_on(folders, tmp_path, capsys):
    import train_scenes

    data, out = folders
    words = ["--tiny", "--unpack", str(out / "packed"), "--flow-steps", "6"]
    train_scenes.main([str(data), str(tmp_path), *words])
    assert "flow: resuming at step 4" in capsys.readouterr().out
    assert torch.load(tmp_path / "flow.pt", weights_only=True)["step"] == 6


def test_a_time_limit_ends_training(folders, tmp_path):
    import train_scenes

    data, out = folders
    train_scenes.main([str(data), str(tmp_path), "--tiny", "--unpack", str(out / "packed"), "--flow-minutes", "0.02"])
    state = torch.load(tmp_path / "flow.pt", weights_only=True)
    assert state["spent"] > 1.2 and state["step"] > 4 and (tmp_path / "model/config.json").is_file()


def test_training_resumes(folders, tmp_path, capsys):
    import train_scenes

    data, out = folders
    words = [str(data), str(tmp_path), "--tiny"]
    train_scenes.main([*words, "--minutes", "0"])
    assert "autoencoder stopped at step 1, 33% of the way" in capsys.readouterr().out
    train_scenes.main([*words, "--autoencoder-only"])
    assert "autoencoder: resuming at step 1" in capsys.readouterr().out and not (tmp_path / "flow.pt").exists()
    train_scenes.main([*words, "--minutes", "0"])
    assert "flow stopped at step 1, 25% of the way" in capsys.readouterr().out
    train_scenes.main(words)
    assert "flow: resuming at step 1" in capsys.readouterr().out
    steps = [torch.load(folder / "flow.pt", weights_only=True)["step"] for folder in (out, tmp_path)]
    assert steps == [4, 4]


def test_batches_follow_from_their_number(folders):
    from scene_autoencoder import Pictures
    from scene_pictures import Renderer

    data, _ = folders
    first, second = (Pictures(Renderer(data), 3) for _ in range(2))
    assert torch.equal(first[5], second[5]) and not torch.equal(first[5], first[6])


def test_worker_processes_make_the_same_data(folders):
    from scene_autoencoder import Pictures
    from scene_flow import Latents
    from scene_pictures import Renderer
    from scene_recipe import TINY
    from torch_loop import Device, read_ahead

    data, out = folders
    renderer = Renderer(data)
    drawn = [
        np.concatenate(
            list(Latents(TINY, renderer, None, out / "latents", Device("cpu", workers)).pictures(range(150)))
        )
        for workers in (0, 2)
    ]
    assert drawn[0].shape == (150, 128, 128, 3) and np.array_equal(*drawn)
    batches = [list(read_ahead(Pictures(renderer, 2), 3, 7, workers)) for workers in (0, 2)]
    assert len(batches[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_captions_fit_the_text_encoder(folders):
    from scene_data import Stream
    from scene_recipe import TEXT_LENGTH
    from scene_words import KINDS

    from mlx_starflow.models.tokenizer import Tokenizer

    _, out = folders
    captions = [Stream(None, 8, kind)[n].caption for kind in KINDS for n in range(400)]
    assert not any(Tokenizer(out / "spiece.model").batch(captions, TEXT_LENGTH)[2])


def test_learning_rate():
    from torch_loop import learning_rate

    rates = [learning_rate(step, step / 1000, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert rates[99:751] == [1.0] * 652, "constant for three quarters"


def test_the_evaluator_learns_and_judges(folders, tmp_path):
    from scene_evaluator import Judge, train_evaluator
    from scene_pictures import Renderer
    from scene_words import Scene
    from torch_loop import Device

    data, _ = folders
    renderer, device = Renderer(data), Device("cpu")
    train_evaluator(renderer, tmp_path / "evaluator.pt", device, steps=12, size=16)
    scene = Scene("one", ("fox",), "black")
    verdict = Judge.read(tmp_path / "evaluator.pt", device)([renderer.render(scene, np.random.default_rng(0))])[0]
    assert verdict.features.shape == (256,)
    assert verdict.has_background(scene) == (verdict.classes["top"] == verdict.classes["bottom"] == "black")
    assert verdict.shows(verdict.classes["first"]) and not verdict.shows("no such thing")


def test_what_doctor_expects(capsys):
    """The report prints what the package holds."""
    from mlx_starflow.bench.doctor import embedded

    example_module("reports/embedded_model.py").main(["data", "run", "--model", "demo", "--only-doctor"])
    *printed, nll = capsys.readouterr().out.splitlines()
    assert float(nll.removeprefix("NLL = ")) == pytest.approx(embedded.NLL, abs=1e-4)
    assert "".join(printed).split() == embedded.IMAGE_MEANS.split()


@pytest.mark.slow
def test_report(folders, tmp_path, capsys):
    embedded_model = example_module("reports/embedded_model.py")
    data, out = folders
    words = ["--most", "2", "--evaluator-steps", "2", "--grid", str(tmp_path / "grid.png")]
    embedded_model.main([str(data), str(out), *words])
    output = capsys.readouterr().out
    assert output.count("(never trained") == 12 and output.count("NLL, nats/dim") == 4
    assert output.count(" of 2") == 2 * len(embedded_model.ROWS)
