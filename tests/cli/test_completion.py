"""`mlx-starflow completion`: the script that a shell runs, and what it is answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from helpers.commands import Command

completion = Command("completion")


def answer(shell: str, line: str, word: int) -> str:
    """What the command says to a shell that asks how the word of this line goes on."""
    asked = {"_MLX_STARFLOW_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    program = "import sys; sys.argv[0] = 'mlx-starflow'; from mlx_starflow.cli import main; main()"
    environment = {**os.environ, **asked}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("shell", ["zsh", "bash", "fish"])
def test_the_script_asks_the_command(shell):
    script = completion(shell).stdout
    assert "mlx-starflow" in script and f"_MLX_STARFLOW_COMPLETE={shell}_complete" in script


def bash_version() -> list[int]:
    if not shutil.which("bash"):
        return []
    version = subprocess.run(["bash", "-c", "echo ${BASH_VERSINFO[@]::2}"], capture_output=True, text=True, check=True)
    return [int(number) for number in version.stdout.split()]


@pytest.mark.skipif(bash_version() < [4, 4], reason="there is no bash of version 4.4 or newer, as on macOS")
def test_bash_takes_the_script():
    script = completion("bash").stdout + "\ncomplete -p mlx-starflow"
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert "_mlx_starflow_completion mlx-starflow" in done.stdout
    assert not done.stderr


def test_commands_and_options_are_completed():
    assert "generate" in answer("zsh", "mlx-starflow gen", 1).split()
    options = answer("bash", "mlx-starflow generate --me", 2).split()
    assert "plain,--method" in options
    assert {line.partition(",")[2] for line in options} >= {"--method"}
    assert "plain,rolling" in answer("bash", "mlx-starflow generate --method r", 3).split()


def test_other_shells_are_a_mistake():
    assert "'tcsh'" in completion.mistake("tcsh")
