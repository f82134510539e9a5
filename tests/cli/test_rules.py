"""Options that would be ignored are refused, in one line that names what they want."""

from __future__ import annotations

import pkgutil

import click
import pytest
from helpers.commands import Command
from helpers.images import write_images

from mlx_starflow.cli import commands, main
from mlx_starflow.cli.options.rules import excludes, find_parameter, needs, option_rules


def all_commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {module.name: main.get_command(context, module.name) for module in pkgutil.iter_modules(commands.__path__)}
    for name, command in list(found.items()):
        if isinstance(command, click.Group):
            found |= {f"{name} {each}": command.commands[each] for each in command.commands}
    return found


def test_rules_are_about_options_that_there_are():
    count = 0
    for name, command in all_commands().items():
        for rule in getattr(command.callback, "rules", ()):
            for each in (rule.option, *rule.others):
                assert find_parameter(command, each), f"{name}: {each}"
            count += 1
    assert count > 30


@click.command()
@click.argument("words", nargs=-1)
@click.option("--a", type=int, default=1)
@click.option("--b/--no-b", default=None)
@click.option("--c", multiple=True)
@option_rules(needs("--a", "--c"), excludes("--no-b", "WORDS"), excludes("--c", "--a 7"))
def command(**options: object) -> None:
    click.echo("done")


@pytest.mark.parametrize(
    "words, refused",
    [
        ([], ""),
        (["--a", "0"], "--a does nothing alone: give --c too, or leave it out"),
        (["--a", "0", "--c", "x"], ""),
        (["--c", "x"], ""),
        (["--a", "7", "--c", "x"], "--c and --a 7 do not go together: leave one of them out"),
        (["--b", "x"], ""),
        (["--no-b"], ""),
        (["x", "--no-b"], "--no-b and WORDS do not go together: leave one of them out"),
    ],
)
def test_rules(words, refused):
    result = click.testing.CliRunner().invoke(command, words)
    assert (result.exit_code == 2) == bool(refused) and refused in result.output


PICTURE = "0.png"


@pytest.mark.parametrize(
    "words, first, second",
    [
        (["cache", "c", "--check", "-o", "other"], "--check", "--output"),
        (["cache", "c", "--check", "--no-resume"], "--check", "--no-resume"),
        (["cache", "pictures", "-o", "c", "--seed", 0], "--seed", "--views"),
        (["cache", "pictures", "-o", "c", "--caption-column", "text"], "text", "no metadata"),
        (["score", PICTURE, "--map-of", "surprise"], "--map-of", "--map"),
        (["score", PICTURE, "--csv", "-", "--json", "-"], "--csv -", "--json -"),
        (["score", PICTURE, "--split", "train"], "--split", "files"),
        (["score", PICTURE, "--captions", "--prompt", "a cat"], "--captions", "--prompt"),
        (["classify", PICTURE, "-l", "a,b", "--split", "train"], "--split", "files"),
        (["classify", PICTURE, "-l", "a,b", "--csv", "-", "--json", "-"], "--csv -", "--json -"),
        (["quantize", "demo", "-o", "q", "--quantize", 4, "--limit", 9], "--limit", "--report"),
        (["quantize", "demo", "-o", "q", "--quantize", 4, "--draws", 9], "--draws", "--report"),
        (["finetune", "demo", "pictures", "-o", "r", "--full", "--scale", 1], "--full", "--scale"),
        (["finetune", "demo", "pictures", "-o", "r", "--full", "--layers", "qkv"], "--full", "--layers"),
        (["finetune", "demo", "pictures", "-o", "r", "--full", "--blocks", "all"], "--full", "--blocks"),
        (["finetune", "demo", "pictures", "-o", "r", "--anchor-weight", 2], "--anchor-weight", "--anchor"),
        (["finetune", "demo", "pictures", "-o", "r", "--anchor-samples", 2], "--anchor-samples", "--anchor"),
        (["finetune", "demo", "pictures", "-o", "r", "--validation", 0, "--draws", 2], "--draws", "--validation"),
        (["train", "pictures", "-o", "m", "--validation", 0.2], "--validation", "flow alone"),
        (["train", "pictures", "-o", "m", "--encoders", "demo"], "--encoders", "flow alone"),
        (["train", "pictures", "-o", "m", "--preset", "tarflow", "--encoders", "demo"], "--encoders", "TarFlow"),
        (["train", "pictures", "-o", "m", "--preset", "tarflow", "--context-full", 0.5], "--context-full", "TarFlow"),
        (["train", "pictures", "-o", "m", "--preset", "small", "--model-config", "f"], "--preset", "--model-config"),
        (["info", PICTURE, "--size", "8x8"], "--size", "is a picture"),
        (["info", "demo", "--frames", 5], "--frames", "makes pictures"),
        (["encode", PICTURE, "-m", "classes", "-o", "n.safetensors", "--guidance", 1], "guidance", "no classes"),
        (["tune", "classes", "--prompt-file", "prompts.txt", "--dry-run"], "--prompt-file", "prompts"),
        (["bench", "classes", "--prompt", "a cat"], "--prompt", "prompts"),
        (["bench", "classes", "--size", "16x16"], "--size", "prompts"),
        (["tune", "classes", "--guidance", 1, "--dry-run"], "guidance", "no classes"),
    ],
)
def test_what_would_be_ignored_is_refused(words, first, second, tmp_path, monkeypatch):
    from helpers.model_directories import write_class_model

    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, 1)
    write_images(tmp_path / "pictures", 3)
    write_class_model(tmp_path / "classes", num_classes=0)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    before = sorted(path for path in tmp_path.rglob("*") if path.suffix != ".lock")
    line = Command(words[0]).mistake(*words[1:])
    assert first in line and second in line, line
    assert sorted(path for path in tmp_path.rglob("*") if path.suffix != ".lock") == before
