"""What `generate` and `score` do with a model of text, and which of their options it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_starflow.cli.options.outputs import claim_outputs
from mlx_starflow.cli.options.rules import given_besides, given_options
from mlx_starflow.cli.options.sampling import with_options
from mlx_starflow.errors import StarflowError

_WRITES = (
    "PROMPTS", "--prompt", "--prompt-file", "--model", "--output", "--overwrite", "--seed", "--images", "--temperature",
    "--method", "--verify", "--dtype", "--json", "--verbose", "--length", "--fill",
)  # fmt: skip
_SCORES = ("PICTURES", "--model", "--draws", "--seed", "--csv", "--json", "--overwrite", "--dtype")

SEPARATOR = "\n----\n"

text_options: Callable[[Any], Any] = with_options(
    click.option("--length", type=click.IntRange(min=1), help="Of a text: characters, those of the prompt included."),
    click.option("--fill", is_flag=True, help="Fill a text's gaps: each _ in PROMPTS is a character to be found."),
)


def check_not_text(model: str) -> None:
    """Raise UsageError if an option for models of text is given, and the model is none."""
    if given := given_options("--length", "--fill"):
        raise click.UsageError(f"{given[0]} is for models of text, and {model} is none: leave it out")


def _check_options(model: str, taken: Sequence[str]) -> None:
    if given := given_besides(*taken):
        raise click.UsageError(f"{given[0]} is for pictures, and {model} is a model of text: leave it out")


def write_texts(
    prompts: Sequence[str],
    *,
    model: str,
    output: Path | None,
    json_file: Path | None,
    seeds: Sequence[int],
    texts: int,
    length: int | None,
    fill: bool,
    temperature: float | None,
    method: str | None,
    verify: bool,
    dtype: str | None,
    verbose: bool,
) -> None:
    """`generate` with a model of text: print the texts, or write them to a file.

    Raises StarflowError, and UsageError for options that it does not take.
    """
    from mlx_starflow.media.files import replacing
    from mlx_starflow.media.outputs import STDOUT
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.pipelines.text import load_text

    _check_options(model, _WRITES)
    if len(seeds) > 1:
        raise click.UsageError("--seed is that of the first text here: give it once, and --images for more texts")
    if fill and length is not None:
        raise click.UsageError("--fill fills gaps of a text that is there: leave out --length")
    claim_outputs([], [output, json_file])
    pipe = load_text(model, dtype=dtype)
    options: dict[str, Any] = {
        "texts": texts,
        "seed": seeds[0] if seeds else None,
        "temperature": 1.0 if temperature is None else temperature,
        "method": "sequential" if method in (None, "auto") else method,
        "verify": verify,
        "progress": None,
    }
    found, rows = [], []
    for prompt in prompts:
        made = pipe.fill(prompt, **options) if fill else pipe.generate(prompt, length=length, **options)
        found += made.texts
        for number, text in enumerate(made.texts):
            rows.append({"prompt": prompt, "seed": made.seed + number, "text": text})
        if made.certificate is not None:
            click.echo(f"{prompt!r}: {made.certificate}", err=True)
            rows[-1] |= {"certificate": {"max": made.certificate.max, "rms": made.certificate.rms}}
        if verbose:
            click.echo(f"{made.evaluations} evaluations, {made.seconds:.1f} s, seed {made.seed}", err=True)
    text = SEPARATOR.join(found) + "\n"
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    elif json_file != STDOUT:
        click.echo(text, nl=False)
    if json_file is not None:
        write_json({"model": model, "temperature": options["temperature"], "texts": rows}, json_file)


def score_texts(
    files: Sequence[Path],
    *,
    model: str,
    draws: int | None,
    seed: int,
    csv_file: Path | None,
    json_file: Path | None,
    dtype: str | None,
) -> None:
    """`score` with a model of text: bits per character of each file. Raises StarflowError, and UsageError."""
    from mlx_starflow.likelihood.text import DRAWS, MOST_TEXT
    from mlx_starflow.media.files import read_text
    from mlx_starflow.media.tables import write_csv, write_json
    from mlx_starflow.pipelines.text import load_text

    _check_options(model, _SCORES)
    claim_outputs([], [csv_file, json_file], inputs=files)
    pipe = load_text(model, dtype=dtype)
    rows = []
    for path in files:
        try:
            score = pipe.score(read_text(path, MOST_TEXT), draws=draws or DRAWS, seed=seed, progress=None)
        except StarflowError as error:
            raise StarflowError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
        rows.append({"file": str(path), **score.to_dict()})
    if csv_file is not None:
        write_csv(rows, csv_file)
    if json_file is not None:
        write_json({"model": model, "seed": seed, "unit": "bits per character", "texts": rows}, json_file)
    if Path("-") in (csv_file, json_file):
        return
    width = max(4, *(len(row["file"]) for row in rows))
    click.echo(f"{'text':<{width}}  {'characters':>10}  {'ELBO':>7}  {'+-':>7}  {'weighted':>8}")
    for row in rows:
        spread = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        bits, weighted = row["bits_per_character"], row["importance_weighted"]
        click.echo(f"{row['file']:<{width}}  {row['characters']:>10}  {bits:>7.4f}  {spread:>7}  {weighted:>8.4f}")
    click.echo(f"at most so many bits per character, by {rows[0]['draws']} draws of the codebook's noise")
