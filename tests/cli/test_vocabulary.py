"""Words that mean the same in every command, and files that are not replaced without a word."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers.commands import Command
from helpers.images import smooth_images
from helpers.model_directories import write_image_model
from PIL import Image

from mlx_starflow.cli import main
from mlx_starflow.cli.options import names
from mlx_starflow.media.metadata import read_metadata

generate, edit = Command("generate"), Command("edit")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_image_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(pattern: str = "*") -> list[str]:
    return sorted(path.name for path in Path().glob(pattern))


# ---- prompts and seeds


def test_prompts_by_option_and_in_place_are_the_same(model):
    assert generate("a cat", "-m", model, "--seed", 3, "-o", "a.png").exit_code == 0
    assert generate("-p", "a cat", "-m", model, "--seed", 3, "-o", "b.png").exit_code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert generate("a cat", "--prompt", "a dog", "-m", model, "-o", "c.png").output.count("seed") == 2


def test_several_seeds(model):
    assert generate("a cat", "a dog", "-m", model, "--seed", 7, "--seed", 3, "-o", "{prompt}-{seed}.png").exit_code == 0
    assert made() == ["a-cat-3.png", "a-cat-7.png", "a-dog-3.png", "a-dog-7.png"]
    assert read_metadata(Path("a-dog-3.png"))["seeds"] == [3]
    line = generate.mistake("a cat", "-m", model, "--seed", 1, "--seed", 2, "-n", 2)
    assert "leave out --images" in line


def test_like_and_its_old_name(model):
    assert generate("a cat", "-m", model, "-o", "a.png").exit_code == 0
    for number, option in enumerate(("--like", "--from")):
        assert generate(option, "a.png", "-o", f"{number}.png").exit_code == 0
        assert Path("a.png").read_bytes() == Path(f"{number}.png").read_bytes()
    assert "--from" not in generate("--help").output


def test_edits_draw_a_seed_and_say_it(model):
    smooth_images(1)[0].save("x.png")
    said = edit("vary", "x.png", "-m", model, "-o", "v.png").output
    assert f"seed {read_metadata(Path('v.png'))['seeds'][0]}\n" in said
    edit("vary", "x.png", "-m", model, "-o", "w.png")
    assert read_metadata(Path("v.png"))["seeds"] != read_metadata(Path("w.png"))["seeds"]


# ---- names


def test_names_with_fields(model):
    words = ["Zwei Äpfel, rot!", "-m", model, "-n", 2, "--seed", 9, "-o", "{index} {prompt} {seed}.png"]
    assert generate(*words).exit_code == 0
    assert made() == ["1 zwei-äpfel-rot 9.png", "2 zwei-äpfel-rot 10.png"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["-o", "{sed}.png"], "there is no field {sed}; names know {prompt}, {seed}, {index}"),
        (["-o", "{seed}/a.png"], "not in its folder's"),
        (["-o", "{prompt}.png", "-n", 2], "the same name; add {index}"),
        (["-o", "{seed}.png", "--best-of", 2], "use {index}"),
        (["-o", "{seed}.png", "-n", 2, "--columns", 2], "--columns is about a grid"),
    ],
)
def test_names_that_cannot_be(words, message, model):
    assert message in generate.mistake("a cat", "-m", model, *words)
    assert made() == []


def test_a_prompt_makes_no_folders_and_no_long_names():
    paths = names.filled(Path("{prompt}.png"), [("../../etc/passwd", 1), ("word " * 200, 2), ("", 3)])
    assert paths[0] == Path("etc-passwd.png") and len(paths[1].name) < 90 and paths[2] == Path("anything.png")


# ---- files that are there


def test_pictures_get_another_number(model):
    for _ in range(3):
        assert generate("a cat", "-m", model).exit_code == 0
    assert made() == ["out-2.png", "out-3.png", "out.png"]
    result = generate("a cat", "-m", model, "--separate", "-n", 2, "-o", "out.png")
    assert result.exit_code == 0
    assert "out-2.png is there already: writing out-1-2.png and so on (--overwrite" in result.stderr
    assert made() == ["out-1-2.png", "out-2-2.png", "out-2.png", "out-3.png", "out.png"]
    before = Path("out.png").read_bytes()
    assert generate("a cat", "-m", model, "--overwrite").exit_code == 0
    assert Path("out.png").read_bytes() != before and len(made()) == 5


def test_tables_and_noise_are_not_replaced(model):
    smooth_images(1)[0].save("x.png")
    for name in ("t.csv", "t.json", "n.safetensors"):
        Path(name).write_text("mine")
    for words in (
        ["score", "x.png", "-m", model, "--csv", "t.csv"],
        ["classify", "x.png", "-l", "a,b", "-m", model, "--json", "t.json"],
        ["encode", "x.png", "-m", model, "-o", "n.safetensors"],
        ["generate", "a cat", "-m", model, "--save-noise", "n.safetensors"],
        ["info", "--json", "t.json"],
    ):
        assert "is there already: give --overwrite to replace it" in Command(words[0]).mistake(*words[1:])
    assert made() == ["n.safetensors", "t.csv", "t.json", "x.png"]
    assert Command("score")("x.png", "-m", model, "--csv", "t.csv", "--overwrite").exit_code == 0
    assert Path("t.csv").read_text() != "mine"


# ---- quality, JSON, models


def test_quality(model):
    for quality in (5, 90):
        words = ["a cat", "-m", model, "--seed", 1, "--size", "64x64", "--quality", quality, "-o", f"{quality}.jpg"]
        assert generate(*words).exit_code == 0
    assert Path("5.jpg").stat().st_size < Path("90.jpg").stat().st_size
    assert "a quality is for .jpg, .jpeg, .webp" in generate.mistake("a cat", "-m", model, "--quality", 5)


def test_json(model):
    smooth_images(1)[0].save("x.png")

    def told(*words):
        result = Command(words[0])(*words[1:], "-m", model, "--json", "-")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert told("generate", "a cat", "--seed", 4)["pictures"][0] | {"certificate": None} == {
        "file": "out.png",
        "prompt": "a cat",
        "seed": 4,
        "fit": None,
        "certificate": None,
    }
    assert told("encode", "x.png", "-o", "n.safetensors")["shape"] == [1, 4, 4, 4]
    assert told("edit", "vary", "x.png", "-o", "v.png", "--seed", 2)["made"][0]["seeds"] == [2]
    assert len(told("edit", "inpaint", "x.png", "--mask", "0,0,4,4", "--steps", 2, "-o", "p.png")["nll"]) == 4
    assert told("info")["tokens"].startswith("16 of 4 numbers")
    assert told("tune", "--dry-run")["blocks"]


def test_a_model_by_option_and_in_place(model):
    def told(*words):
        return [line for line in Command("info")(*words).stdout.splitlines() if not line.startswith("BLAS")]

    assert told(model) == told("-m", model) and told(model)
    assert "MODEL and --model are the same" in Command("info").mistake(model, "--model", model)
    assert "there is no model: give MODEL" in Command("fuse").mistake("--lora", "a", 1, "-o", "b")


def test_a_model_by_option_before_what_comes_after_it(model, tmp_path):
    export, finetune = Command("export"), Command("finetune")
    assert export(model, "a.pth").exit_code == 0
    assert export("-m", model, "b.pth").exit_code == 0 and export("c.pth", "--model", model).exit_code == 0
    assert Path("a.pth").read_bytes() == Path("b.pth").read_bytes() == Path("c.pth").read_bytes()
    assert "Missing argument 'CHECKPOINT'" in export.mistake("-m", model)
    assert "Missing argument 'CHECKPOINT'" in export.mistake(model)
    assert "DIR and --model are the same" in export.mistake(model, "d.pth", "-m", model)
    assert "there is no data" in finetune.mistake("there is no data", "-m", model, "-o", "run")
    assert "Missing argument 'DATA'" in finetune.mistake("-m", model, "-o", "run")
    Path("options.yaml").write_text(f"model: nowhere\ndata: {tmp_path / 'gone'}\noutput: run\n")
    smooth_images(1)[0].save("x.png")
    Path("x.txt").write_text("a picture")
    assert "unknown model 'nowhere'" in finetune.mistake("nowhere", ".", "--config", "options.yaml")
    dry = finetune(".", "-m", model, "--config", "options.yaml", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "gone does not exist" in finetune.mistake("-m", model, "--config", "options.yaml", "--dry-run")


def test_weights_are_quantized_as_they_are_read(tmp_path_factory):
    words = ["a cat", "--seed", 1]
    assert generate(*words, "-o", "a.png").exit_code == 0
    assert generate(*words, "-q", 4, "-o", "b.png").exit_code == 0
    first, second = (Image.open(name).tobytes() for name in ("a.png", "b.png"))
    assert first != second


def test_sizes_that_the_model_has_not_seen():
    assert "was trained at 128x128" in generate("a cat", "--size", "32x32", "-o", "a.png").stderr
    assert "trained" not in generate("a cat", "--size", "128x128", "-o", "b.png").stderr


# ---- help


def every_command() -> list[tuple[str, click.Command]]:
    found, context = [], click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {each}", command.commands[each]) for each in command.commands]
    return found


MODELLESS = {
    *("completion", "doctor", "train", "convert", "edit", "upscale"),
    *("convert release", "convert flow", "convert text-encoder", "convert vae"),
}
"""Commands without a flow to run: `train` makes one, and `--init` and `--encoders` are what it makes it of."""


@pytest.mark.parametrize("name, command", every_command())
def test_every_model_is_given_as_in_all_other_commands(name, command):
    spellings = {option for each in command.params if isinstance(each, click.Option) for option in each.opts}
    assert ("-m" in spellings) == ("--model" in spellings) == (name not in MODELLESS)


def test_short_options_mean_the_same_everywhere():
    meanings: dict[str, set[str]] = {}
    for _, command in every_command():
        for option in command.params:
            if isinstance(option, click.Option):
                short = [each for each in option.opts if not each.startswith("--")]
                for each in short:
                    meanings.setdefault(each, set()).add(max(option.opts, key=len))
    assert {each: names for each, names in meanings.items() if len(names) > 1} == {}


def test_summaries_are_whole():
    for words in ([], ["edit"], ["convert"]):
        listed = CliRunner().invoke(main, [*words, "--help"]).output.partition("Commands:")[2]
        assert listed and "..." not in listed


@pytest.mark.parametrize("name", [name for name, _ in every_command()])
def test_defaults_are_shown_once(name):
    text = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=1000).output
    assert not [line for line in text.splitlines() if line.count("[default: ") > 1]


@pytest.mark.parametrize(
    "words, near",
    [
        (["generat"], "Did you mean generate?"),
        (["edit", "inpant"], "Did you mean inpaint?"),
        (["generate", "--sed"], "--seed"),
    ],
)
def test_misspelt(words, near):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and near in result.stderr and result.stderr.count("\n") == 1
