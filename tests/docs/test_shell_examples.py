"""Every command that README, docs and help texts show is one that is understood: its name, options and values."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers.pages import PAGES, Words, arguments, commands, python_blocks, split
from helpers.paths import EXAMPLES, ROOT

from mlx_starflow.cli import main


def all_commands(group: click.Group) -> Iterator[click.Command]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield command
        if isinstance(command, click.Group):
            yield from all_commands(command)


def in_help() -> list[Words]:
    """The examples of all help texts."""
    found = []
    for command in all_commands(main):
        lines = [line.strip() for line in (command.help or "").splitlines()]
        found += [
            Words(f"{command.name} --help", words, True)
            for line in lines
            if line.startswith(("mlx-starflow ", "mlx.launch "))
            for words in split(line)
        ]
    return found


def in_scripts() -> list[Words]:
    """How the scripts of examples/ say in their first lines that they are run."""
    found = []
    for path in sorted(EXAMPLES.glob("**/*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines = re.findall(r"(python examples/[^`\n]*)", text)
        found += [Words(path.name, words, True) for line in lines for words in split(line)]
    return found


SHOWN = [words for page in PAGES for words in commands(page.read_text(), page.name)] + in_help()
OURS = [words for words in SHOWN if arguments(words.words) is not None]
SCRIPTS = [words for words in SHOWN if any(word.startswith("examples/") for word in words.words)]
SCRIPTS += in_scripts()


SHORT = {"calibrate", "classify", "completion", "decode", "edit", "encode", "generate", "info", "score"}


def test_there_are_examples() -> None:
    assert len([words for words in OURS if words.page == "README.md"]) > 5
    assert len([words for words in OURS if words.page.endswith("--help")]) > 20
    assert len(SCRIPTS) > 10 and any(map(python_blocks, PAGES))


@pytest.fixture
def nothing_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands read their words and end there; files that they are to read need not be, except options' own."""
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    monkeypatch.setattr(click.Path, "convert", lambda self, value, option, context: Path(value))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("model: demo\ndata: pictures\n")
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    (tmp_path / "run.yaml").write_text("data: pictures\noutput: model\n")


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize("example", OURS, ids=str)
def test_it_is_understood(example: Words) -> None:
    words = arguments(example.words)
    assert words is not None
    result = CliRunner().invoke(main, words)
    said = result.output
    if not example.whole and "Missing " in said:  # a sentence names a command and need not repeat all its words
        return
    assert result.exit_code == 0, f"{example}\n{said}"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "quickstart.md", "likelihood.md", "troubleshooting.md"])
def test_it_runs(page: str, belongings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's commands that need no download and train nothing, one after another, in one folder."""
    shutil.copytree(belongings, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    ran = 0
    for example in OURS:
        words = arguments(example.words) or []
        alone = not any(word.startswith("apple/") or word == "MODEL" for word in words)
        if example.page == page and example.whole and alone and words[0] in SHORT and "=" not in example.words[0]:
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, f"{example}\n{result.output}"
            ran += 1
    assert ran


@pytest.mark.parametrize("example", SCRIPTS, ids=str)
def test_scripts_have_the_options_they_are_given(example: Words) -> None:
    script = next(word for word in example.words if word.startswith("examples/"))
    source = (ROOT / script).read_text()
    for helper in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE):
        if (EXAMPLES / f"{helper}.py").exists():
            source += (EXAMPLES / f"{helper}.py").read_text()
    after = example.words[example.words.index(script) + 1 :]
    for option in (word.partition("=")[0] for word in after if word.startswith("--")):
        assert f'"{option}"' in source, option
