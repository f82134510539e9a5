import json

import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model

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
        "blocks", "methods", "ratios", "notes",
    }  # fmt: skip
    assert (figures["pictures"], figures["tokens"], figures["guidance"], figures["seed"]) == (2, 24, 0.0, 3)
    assert figures["blocks"][0].keys() == {"block", "layers", "rows", "weight_bytes", "product_seconds"}
    assert [one["method"] for one in figures["methods"]] == ["rolling", "sequential"]
    assert all(block["rows"] == 2 for block in figures["blocks"])
    for one in figures["methods"]:
        assert one.keys() == {
            "method", "backend", "seconds", "rounds", "tokens_per_second", "evaluations", "tokens_per_evaluation",
            "weight_bytes_per_picture", "bandwidth", "share", "product_seconds", "seconds_over_products", "peak_memory",
            "certificate",
        }  # fmt: skip
        assert len(one["rounds"]) == 2


def test_mistakes(model, tmp_path):
    assert "unknown sampling method 'best'; it must be one of" in bench.mistake(model, "--methods", "best")
    assert "holds no config.json" in bench.mistake(tmp_path)
    assert "is not a size" in bench.mistake(model, "--size", "large")
    assert "there is no method to time" in bench.mistake(model, "--methods", ",")


@pytest.mark.torch
def test_against_torch(model):
    result = bench(model, "--repeats", 1, "--methods", "sequential", "--against", "torch")
    assert result.exit_code == 0, result.output
    assert "times as fast as torch" in result.stdout
    assert "sequential torch   16 (1.0), 16 (1.0)" in result.stdout.splitlines()
