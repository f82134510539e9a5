"""`mlx-starflow completion`: a script that completes commands and options in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM = "mlx-starflow"
VARIABLE = "_MLX_STARFLOW_COMPLETE"
"""The environment variable by which click knows that a shell asks, made of the program's name."""


@click.command()
@click.argument("shell", type=click.Choice(["zsh", "bash", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in SHELL; its startup file is to run it.

    \b
    echo 'eval "$(mlx-starflow completion zsh)"' >> ~/.zshrc
    echo 'eval "$(mlx-starflow completion bash)"' >> ~/.bashrc
    mlx-starflow completion fish > ~/.config/fish/completions/mlx-starflow.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    script = kind(context.find_root().command, {}, PROGRAM, VARIABLE)
    # Not `source()`: for bash that starts another bash, to ask its version.
    click.echo(script.source_template % script.source_vars())
