"""The script that trains students in PyTorch, in tiny."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers.model_directories import save_flow, write_image_model
from helpers.paths import EXAMPLES
from helpers.students import tiny_student
from helpers.tiny_flows import tiny_case, tiny_flow
from helpers.torch_reference import give_weights, relative

from mlx_starflow import load
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_student
from mlx_starflow.sampling.progress import watch
from mlx_starflow.training.loop.student_objective import student_errors, student_loss
from mlx_starflow.training.recipes.student import NewStudent

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
sys.path.insert(0, str(EXAMPLES))

SMALL = ("--batch", "8", "--layers", "2", "--watch-every", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(model, tmp_path_factory):
    """A folder of 128 pairs, as `distill` makes them."""
    out = tmp_path_factory.mktemp("pairs")
    run = NewStudent(model, out, prompts=["a cat", "a dog"], pairs=128)
    run.source.folder(True, watch(None))
    return out / "pairs"


@pytest.mark.parametrize("kind", [(), ("--kind", "matching"), ("--kind", "matching", "--independent")])
def test_a_student_is_trained_and_used(model, pairs, kind, tmp_path, capsys):
    import train_student

    words = [str(model), str(tmp_path), "--pairs", str(pairs), *kind, *SMALL]
    train_student.main([*words, "--steps", "4"])
    printed = capsys.readouterr().out
    assert printed.count("held out: ") == 2 and ("velocity" in printed) == bool(kind)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"]["bits"] == 8 and config["guidance"] == 1.0 and config["temperature"] == 0.8
    pipe = load(model)
    made = pipe.generate("a cat", seed=1, student=str(tmp_path))
    assert made.stats.student_evaluations == (4 if kind else 1) and made.images[0].size == (8, 8)
    assert (tmp_path / "samples.png").is_file()
    assert not np.allclose(np.array(made.latents), 0), "it has learned something"


def test_pairs_are_those_of_distill(model, pairs, tmp_path):
    import train_student
    from torch_loop import Device

    from mlx_starflow.training.data.pairs.files import PairFolder

    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    train_student.make_pairs(str(model), tmp_path, 128, tmp_path / "prompts.txt", Device("cpu"))
    ours, theirs = PairFolder.found(tmp_path / "pairs"), PairFolder.found(pairs)
    assert ours.identity == theirs.identity and ours.grid == theirs.grid == (4, 4)
    mine, other = (folder.read(np.arange(128)) for folder in (ours, theirs))
    assert mine.keys() == other.keys() == {"noise", "states", "clean", "condition"}
    for name, array in mine.items():
        # bfloat16 in the products.
        assert np.sqrt(np.square(array - other[name]).mean()) < 0.03 * other[name].std(), name


def test_a_student_begins_with_its_teachers_layers(tmp_path):
    import train_student

    from mlx_starflow.reference.loading import load_flow
    from mlx_starflow.reference.student import Student

    alike = {"norm_type": "rms_norm", "use_qk_norm": True, "head_dim": 16, "layers_per_block": [1, 2]}
    flow = tiny_flow("image", **alike)
    folder = save_flow(tmp_path / "model", flow)
    sizes = {"channels": 64, "num_heads": 4, "num_kv_heads": 4, "num_layers": 3, "use_qk_norm": True}
    student = Student(tiny_student(flow, **sizes).config)
    train_student.begin_from(student, str(folder))
    deep = load_flow(folder).blocks[-1]
    for mine, its in zip(student.attn_blocks, deep.attn_blocks, strict=False):
        assert all(torch.equal(mine.state_dict()[name], value) for name, value in its.state_dict().items())
    assert torch.equal(student.proj_txt.weight, deep.proj_txt.weight)
    h = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(student.attn_blocks[2](h, None, causal=False), h), "what is new does nothing yet"
    with pytest.raises(StarflowError, match="a student of 64 channels"):
        train_student.begin_from(Student(tiny_student(flow, channels=32, use_qk_norm=True).config), str(folder))


def test_training_resumes(model, pairs, tmp_path, capsys):
    import train_student

    words = [str(model), str(tmp_path), "--pairs", str(pairs), "--steps", "3", *SMALL]
    train_student.main([*words, "--stop-after", "0"])
    assert "stopped at step 1" in capsys.readouterr().out and not (tmp_path / "config.json").exists()
    train_student.main(words)
    assert "resuming at step 1" in capsys.readouterr().out
    assert load_student(tmp_path, load(model).model).config.kind == "inverse"


def test_pairs_of_another_model_and_none(model, pairs, tmp_path):
    import train_student

    with pytest.raises(StarflowError, match="has no pairs: make some with mlx-starflow distill"):
        train_student.main([str(model), str(tmp_path)])
    with pytest.raises(StarflowError, match="holds pairs of another model than demo"):
        train_student.main(["demo", str(tmp_path), "--pairs", str(pairs)])


@pytest.mark.parametrize("kind", ["inverse", "matching"])
def test_losses_are_those_of_distill(kind):
    import torch_training

    from mlx_starflow.reference.student import Student

    tiny, rng = tiny_case("softplus"), np.random.default_rng(2)
    scales = {"inverse": (1.0, 2.0, 1.0, 0.5), "matching": (2.0,)}[kind]
    student = tiny_student(tiny.flow, kind, scales=scales)
    reference = give_weights(Student(student.config), student)
    batch = {name: rng.standard_normal((2, 6, 2), np.float32) for name in ("noise", "clean")}
    batch["condition"] = np.array(tiny.text)[:2]
    if kind == "inverse":
        batch |= {"states": rng.standard_normal((2, 3, 6, 2), np.float32), "refined": np.ones(2, np.float32)}
    else:
        batch["time"] = np.float32([0.2, 0.9])
    ours, theirs = ({name: make(array) for name, array in batch.items()} for make in (mx.array, torch.from_numpy))
    errors = torch_training.student_errors(reference, theirs, (2, 3))
    # bfloat16 in the products.
    for mine, other in zip(student_errors(student, ours, (2, 3)), errors, strict=True):
        assert relative(mine, other) < 0.05
    loss, numbers = torch_training.student_loss(errors)
    expected, metrics = student_loss(student, ours, (2, 3))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=0.03)
    assert numbers == {name: pytest.approx(float(value), rel=0.05) for name, value in metrics.items()}


def test_padding_is_left_out():
    from torch_training import student_errors as errors_of
    from torch_training import without_padding

    from mlx_starflow.reference.student import Student

    tiny, generator = tiny_case("softplus"), torch.Generator().manual_seed(1)
    reference = give_weights(Student(tiny_student(tiny.flow).config), tiny_student(tiny.flow))
    text = torch.randn(4, 3, 6, generator=generator)
    for row, length in enumerate((2, 0, 3, 1)):
        text[row, length:] = 0
    batch = {"noise": torch.arange(4.0)[:, None, None].expand(4, 6, 2), "condition": text}
    short, long = without_padding(batch, 2)
    assert short["noise"][:, 0, 0].tolist() == [1, 3] and long["noise"][:, 0, 0].tolist() == [0, 2]
    assert short["condition"].shape == (2, 1, 6) and long["condition"].shape == (2, 3, 6)
    assert torch.equal(short["condition"][1], text[3, :1])
    # The rows that are left are where they were.
    full = {"noise": batch["noise"], "clean": batch["noise"], "states": torch.zeros(4, 3, 6, 2), "condition": text}
    *_, last = without_padding(full, 2)
    expected = torch.stack(errors_of(reference, full, (2, 3)))[:, [0, 2]]
    assert torch.allclose(torch.stack(errors_of(reference, last, (2, 3), 3)), expected)


def test_batches_are_passes_that_follow_from_their_number(pairs):
    from train_student import Batches

    from mlx_starflow.training.data.pairs.batches import PairData
    from mlx_starflow.training.data.pairs.files import PairFolder

    data = PairData(PairFolder.found(pairs), np.arange(20), refined=0.5)
    first, again = Batches(data, 8), Batches(data, 8)
    noise = torch.cat([first[step]["noise"] for step in range(5)])
    assert torch.equal(noise[24:32], again[3]["noise"])
    assert len({float(value) for value in noise[:20, 0, 0]}) == len({float(value) for value in noise[20:, 0, 0]}) == 20
    assert {"refined" in first[step] for step in range(10)} == {True, False}
