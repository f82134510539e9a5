import json

import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model, write_video_model

bench = Command("bench")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


def test_table(model):
    result = bench(model, "--repeats", 1)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines[1:-1])) <= 120
    rows = {line.split()[0]: line.split() for line in lines if "RMS" in line}
    assert rows.keys() == {"sequential", "jacobi", "rolling"}
    assert "sequential mlx     16 (1.0), 16 (1.0)" in lines
    assert lines[-1].startswith("Note: auto is rolling")
    assert "round 1 of 1" in result.stderr and "round" not in result.stdout


def test_json(model):
    words = ["--methods", "rolling, sequential", "--guidance", 0, "--prompt", "a", "--prompt", "b", "--size", "8x12"]
    result = bench(model, *words, "--seed", 3, "--dtype", "float32", "--repeats", 2, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures.keys() == {
        "model", "machine", "mlx", "dtype", "pictures", "tokens", "guidance", "seed", "matrix_vector_bandwidth",
        "blocks", "methods", "ratios", "notes", "frames",
    }  # fmt: skip
    assert figures["frames"] == 1
    assert (figures["pictures"], figures["tokens"], figures["guidance"], figures["seed"]) == (2, 24, 0.0, 3)
    assert figures["blocks"][0].keys() == {"block", "layers", "rows", "weight_bytes", "product_seconds"}
    assert [one["method"] for one in figures["methods"]] == ["rolling", "sequential"]
    assert all(block["rows"] == 2 for block in figures["blocks"])
    for one in figures["methods"]:
        assert one.keys() == {
            "method", "backend", "seconds", "rounds", "tokens_per_second", "evaluations", "tokens_per_evaluation",
            "weight_bytes_per_picture", "bandwidth", "share", "product_seconds", "seconds_over_products", "peak_memory",
            "certificate", "evaluations_per_frame", "seconds_per_frame",
        }  # fmt: skip
        assert len(one["rounds"]) == 2


def test_videos(tmp_path):
    """In evaluations and seconds of a latent frame too; blocks that see one frame make all of them at once."""
    model = write_video_model(tmp_path)
    result = bench(
        model, "--repeats", 1, "--methods", "sequential,jacobi", "--frames", 9, "--json", tmp_path / "a.json"
    )
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "a.json").read_text())
    assert (figures["frames"], figures["tokens"]) == (3, 18)
    one, official = figures["methods"]
    assert one["evaluations"] == [18, 6, 6]
    assert one["evaluations_per_frame"] == 10 and one["tokens_per_evaluation"] == [1, 1, 1]
    assert one["seconds_per_frame"] == one["seconds"] / 3
    assert [block["rows"] for block in figures["blocks"]] == [2, 3, 3]
    assert "a latent frame, of which a video has 3:" in result.stdout
    assert "sequential mlx     10.00 evaluations" in result.stdout
    assert official["evaluations"][0] < 18
    assert "at most 17, as it was trained on" in bench.mistake(model, "--frames", 21)
    assert "13 or 17, not 16" in bench.mistake(model, "--frames", 16)
    result = bench(model, "--repeats", 1, "--methods", "sequential", "--frames", 1)
    assert result.exit_code == 0 and "latent frame" not in result.stdout


def test_mistakes(model, tmp_path):
    assert "unknown sampling method 'best'; it must be one of" in bench.mistake(model, "--methods", "best")
    assert "holds no config.json" in bench.mistake(tmp_path)
    assert "is not a size" in bench.mistake(model, "--size", "large")
    assert "it makes pictures" in bench.mistake(model, "--frames", 9)
    assert "there is no method to time" in bench.mistake(model, "--methods", ",")


@pytest.mark.torch
def test_against_torch(model):
    result = bench(model, "--repeats", 1, "--methods", "sequential", "--against", "torch")
    assert result.exit_code == 0, result.output
    assert "times as fast as torch" in result.stdout
    assert "sequential torch   16 (1.0), 16 (1.0)" in result.stdout.splitlines()
