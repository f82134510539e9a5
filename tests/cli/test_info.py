import shutil

import pytest
from click.testing import CliRunner
from helpers.model_directories import write_class_model, write_image_model
from helpers.tiny_flows import tiny_flow

from mlx_starflow.cli import main
from mlx_starflow.model_dir.hub import CACHE_VARIABLE
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters


def info(*words):
    return CliRunner().invoke(main, ["info", *map(str, words)])


def table(output, title):
    """A table of the report: name -> cells."""
    lines = output.split(f"\n{title} ")[1].split("\n\n")[0].splitlines()[1:]
    return {name: cells for name, *cells in (line.strip().rsplit(maxsplit=5) for line in lines) if cells}


def test_a_model(tmp_path):
    result = info(write_image_model(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"model          {tmp_path} (starflow)" in result.output
    weights = parameters(tiny_flow()).values()
    millions, size = sum(each.size for each in weights) / 1e6, sum(each.nbytes for each in weights) / 2**20
    assert f"flow           {millions:.2f} M parameters, {size:.1f} MiB" in result.output
    assert "block 1        1 layers, width 64" in result.output
    assert "guidance       1.0" in result.output
    assert "one picture of 8x8: computed from the configs, not measured" in result.output
    assert "as stored" not in result.output


def test_the_demo_is_quantized():
    result = info()
    assert result.exit_code == 0, result.output
    assert "as stored" in result.output and "quantized" in result.output


def test_precision():
    """What is used, and why; the device here is a CPU or a GPU without TF32."""
    lines = dict(line.split(maxsplit=1) for line in info().output.splitlines()[:20] if " " in line)
    assert lines["precision"].startswith("float32: ")  # also on a GPU: the embedded model is quantized
    assert lines["float32"] == "products are whole: TF32 is off, or this device has none"


def test_the_official_release_needs_no_download(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    result = info("apple/starflow")
    assert result.exit_code == 0, result.output
    assert "flow           3858.28 M parameters" in result.output
    assert "mlx-starflow convert apple/starflow" in result.output
    macs = table(result.output, "Macs")
    assert macs["8 GB"] == ["no", "no", "no", "--low-memory", "--low-memory"]
    assert macs["64 GB"] == ["yes"] * 5
    weights = table(result.output, "weights")
    assert weights["flow"][1] == "7.20"
    assert max(map(len, result.output.splitlines())) <= 120


def test_size_and_batch(tmp_path):
    directory = write_image_model(tmp_path)
    small, large = info(directory), info(directory, "--size", "32x16", "--batch-size", 4)
    assert "4 pictures at once of 32x16" in large.output
    peaks = [float(table(each.output, "peak, all in memory")["decode"][0]) for each in (small, large)]
    assert peaks[1] > 2 * peaks[0]
    result = info(directory, "--size", "9x9")
    assert result.exit_code == 2 and "multiples of 2 pixels" in result.output


def test_keys_and_values(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    plain, eight = info("apple/starflow-v"), info("apple/starflow-v", "--kv-bits", 8)
    assert "Keys and values are in 8 bits" in eight.output and "Keys and values are" not in plain.output
    peaks = [float(table(each.output, "peak with --low-memory")["flow"][-1]) for each in (plain, eight)]
    sizes = table(plain.output, "keys and values")
    assert sizes == table(eight.output, "keys and values")
    saved = float(sizes["as computed"][-1]) - float(sizes["in 8 bits"][-1])
    assert peaks[0] - peaks[1] == pytest.approx(saved, abs=0.1)
    both = table(info("apple/starflow-v", "--kv-bits", "8,4").output, "peak with --low-memory")
    saved = float(sizes["in 8 bits"][-1]) - float(sizes["in 8 bits, null in 4"][-1])
    assert peaks[1] - float(both["flow"][-1]) == pytest.approx(saved, abs=0.1)
    assert info("demo", "--kv-bits", 3).exit_code == 2


def test_a_flow_alone(tmp_path):
    flow = tiny_flow()
    save_model(tmp_path, parameters(flow), {"model_type": "starflow", **flow.config.to_dict()})
    result = info(tmp_path)
    assert result.exit_code == 0, result.output
    assert "parameters" in result.output and "Macs" not in result.output


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "model_type None is not a flow's"), ("{", "not valid JSON"), (None, "no config.json")]
)
def test_errors(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    result = info(tmp_path)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"nvp": False}])
def test_a_tarflow(changes, tmp_path):
    result = info(write_class_model(tmp_path, **changes))
    assert result.exit_code == 0, result.output
    assert "(tarflow)" in result.output and "16 of 12 numbers, patches of 2" in result.output
    assert ("classes" in result.output) == (changes != {"num_classes": 0})


@pytest.mark.parametrize(
    "how, line",
    [
        ("8", "quantized: 8 bits, groups of 64"),
        ("mixed", "mixed: 4 bits, 6 in some layers, groups of 64"),
        ("mxfp4", "mxfp4: 4 bits, groups of 32"),
        ("nvfp4", "nvfp4: 4 bits, groups of 16"),
    ],
)
def test_how_weights_are_stored(tmp_path, how, line):
    made = CliRunner().invoke(main, ["quantize", "demo", "-o", str(tmp_path / "q"), "-q", how])
    assert made.exit_code == 0, made.output
    lines = info(tmp_path / "q").output.splitlines()
    assert line in next(each for each in lines if each.startswith("flow"))
    assert "bfloat16" in next(each for each in lines if each.startswith("autoencoder"))


def test_a_flow_alone_says_so(tmp_path):
    model = write_image_model(tmp_path)
    assert "lacks" not in info(model).output
    for part in ("vae", "text_encoder"):
        shutil.rmtree(model / part)
    assert "lacks          text encoder and autoencoder: a flow alone" in info(model).output
