"""`mlx-starflow quantize`: a smaller model, and what it costs."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.outputs import OUTPUT, claim_outputs, overwrite_option
from mlx_starflow.cli.options.rules import needs, option_rules
from mlx_starflow.cli.options.vocabulary import model_argument, optional_json_option
from mlx_starflow.model_dir.precision import MIXED, QUANTIZATIONS


@click.command()
@model_argument(default=None, metavar="DIR")
@click.option("-o", "--output", type=OUTPUT, required=True, metavar="OUT", help="Folder to write.")
@click.option(
    "-q", "--quantize", "how", type=click.Choice(list(QUANTIZATIONS)), help="Of the flow; left as it is if absent."
)
@click.option(
    "--text-encoder",
    type=click.Choice([name for name in QUANTIZATIONS if name != MIXED]),
    help="Of the text encoder; left as it is if absent.",
)
@click.option("--group-size", type=click.IntRange(min=1), metavar="N", help="Weights that share a scale.")
@click.option(
    "--report",
    "folder",
    type=click.Path(path_type=Path),
    metavar="PICTURES",
    help="Say what it costs in exact likelihood on this folder of pictures with a metadata.jsonl.",
)
@click.option("--limit", type=click.IntRange(min=2), default=64, help="Pictures to report on.")
@click.option("--draws", type=click.IntRange(min=1), default=4, help="Of the noise, a picture.")
@optional_json_option
@overwrite_option
@option_rules(
    needs("--json", "--report", reason="--json is the format of the report: give --report PICTURES too"),
    needs("--limit", "--report"),
    needs("--draws", "--report"),
)
def quantize(
    model: str,
    output: Path,
    how: str | None,
    text_encoder: str | None,
    group_size: int | None,
    folder: Path | None,
    limit: int,
    draws: int,
    json_file: Path | None,
) -> None:
    """Quantize the model in DIR: its flow with --quantize, its text encoder with --text-encoder.

    8, 6 and 4 are bits of MLX's affine quantization, mxfp8, mxfp4 and nvfp4 floating-point formats. mixed is 4 bits
    with 6 in the shallow blocks, where nearly all of the loss of plain 4 bits comes from.

    \b
    mlx-starflow quantize model -o model-mixed --quantize mixed --text-encoder 8
    mlx-starflow quantize demo -o small --quantize 4 --report my-pictures
    """
    from mlx_starflow.likelihood.quantization_cost import CaptionedData, Comparison, measure
    from mlx_starflow.media.outputs import STDOUT
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.model_dir.requantize import quantize_model
    from mlx_starflow.pipelines import load

    claim_outputs([], [json_file], folders=[output], inputs=[] if folder is None else [model, folder])
    data = None if folder is None else CaptionedData.read(load(model, low_memory=True), folder, limit)
    quantize_model(model, output, how, text_encoder=text_encoder, group_size=group_size)
    if data is None:
        size = sum(path.stat().st_size for path in output.glob("**/model*.safetensors"))
        click.echo(f"{output}: {size / 2**20:,.1f} MiB of weights")
        return
    cpu.hint_if_slow()
    before, after = (measure(load(each, low_memory=True), data, draws=draws) for each in (model, output))
    comparison = Comparison(before, after)
    if json_file is not None:
        write_json(comparison.to_dict(), json_file)
    if json_file != STDOUT:
        click.echo(comparison)
