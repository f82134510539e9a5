"""`mlx-starflow doctor`: check what this machine computes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from mlx_starflow.cli.options.outputs import OUTPUT


@click.command()
@click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write JSON too; - prints it alone.")
def doctor(json_file: Path | None) -> None:
    """Check what this machine computes: versions, kernels, precision, certificates, speed, memory.

    \b
    mlx-starflow doctor
    mlx-starflow doctor --json report.json

    It takes about half a minute, downloads nothing and sends nothing. Every line says what was measured and, in
    brackets, the bound it must keep. If one failed, the exit code is 1. Please report what it prints, whatever it is,
    if your machine is one that docs/mac.md says nothing about: it names the machine's kind, and no file or user.
    """
    from mlx_starflow.bench.doctor import examine
    from mlx_starflow.media.outputs import STDOUT, check_outputs
    from mlx_starflow.media.tables import write_json

    check_outputs([json_file])
    tell = partial(click.echo, err=json_file == STDOUT)
    tell("mlx-starflow doctor: please paste all of this into a report\n")
    report = examine(tell)
    tell(f"\n{report.summary()}")
    if json_file is not None:
        write_json(report.to_dict(), json_file)
    if report.failed:
        click.get_current_context().exit(1)
