"""`mlx-starflow evaluate`: how good a model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.interrupt import resumable
from mlx_starflow.cli.options.outputs import OUTPUT, claim_outputs, files_read, overwrite_option
from mlx_starflow.cli.options.rules import excludes, needs, option_rules
from mlx_starflow.cli.options.sampling import Size, lora_option, network_options, sampling_options
from mlx_starflow.cli.options.vocabulary import json_option, model_argument

if TYPE_CHECKING:
    from mlx_starflow.evaluation import CLIPScorer, InceptionFeatures, ListedPrompt
    from mlx_starflow.media.image_files import ImageFile

RESIZES = ("tensorflow", "pytorch")


@click.command()
@model_argument()
@click.option("--data", type=click.Path(path_type=Path), help="Real pictures: what the model was trained on.")
@click.option("--split", default="train", help='Of a metadata.jsonl: only lines with this "split".')
@click.option(
    "--held-out",
    type=click.Path(path_type=Path),
    help='Pictures that the model has not seen.  [default: lines of --data with "split": "validation"]',
)
@click.option("--limit", type=click.IntRange(min=20), help="Most real pictures, spread evenly; all by default.")
@click.option("--statistics", type=click.Path(path_type=Path), help="Of real pictures: .npz (mu, sigma) or .pth.")
@click.option("--save-statistics", type=OUTPUT, metavar="FILE", help="Write those of --data, as .npz or .pth.")
@click.option(
    "--count",
    type=click.IntRange(20, 1_000_000),
    help="Samples; by default as many as there are real pictures, at most 5000, or one a prompt.",
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    help="Prompts of the samples: GenEval's .jsonl, HPSv2's .json, or one a line; captions of --data by default.",
)
@click.option("-o", "--output", type=OUTPUT, metavar="DIR", help="Keep here what is computed; again, it goes on there.")
@click.option(
    "--features",
    type=click.Choice(["auto", "inception", "own"]),
    default="auto",
    help="Compare by Inception-V3, or by the model's own autoencoder; auto: Inception if its weights are here.",
)
@click.option("--inception", type=click.Path(path_type=Path), metavar="FILE", help="The weights that FID is made with.")
@click.option(
    "--resize",
    type=click.Choice(RESIZES),
    default=RESIZES[0],
    help="How pictures become Inception's size: as TensorFlow and torch-fidelity do, or as pytorch-fid.",
)
@click.option(
    "--clip", type=click.Path(path_type=Path), metavar="DIR", help="A CLIP's Hugging Face folder: CLIP score."
)
@click.option("--likelihood", type=click.IntRange(min=0), default=256, help="Pictures of each kind to score; 0: none.")
@click.option("--draws", type=click.IntRange(1, 10_000), default=4, help="Of the training noise.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the first sample.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, help="Samples at once.")
@json_option
@overwrite_option
@click.option("--size", type=Size(), help="Of the pictures, in pixels; the model's own by default.")
@sampling_options
@lora_option
@network_options
@option_rules(
    excludes("--data", "--statistics"),
    needs("--save-statistics", "--data"),
    needs("--limit", "--data"),
    excludes("--features own", "--inception", "--resize pytorch"),
)
def evaluate(
    model: str,
    data: Path | None,
    split: str,
    held_out: Path | None,
    limit: int | None,
    statistics: Path | None,
    save_statistics: Path | None,
    count: int | None,
    prompt_file: Path | None,
    output: Path | None,
    features: str,
    inception: Path | None,
    resize: str,
    clip: Path | None,
    likelihood: int,
    draws: int,
    seed: int,
    batch_size: int,
    json_file: Path | None,
    size: tuple[int, int] | None,
    guidance: float | None,
    temperature: float | None,
    method: str | None,
    verify: bool | None,
    attn_temp: float | None,
    denoise: bool | None,
    kv_bits: str | None,
    adapters: tuple[tuple[str, float], ...],
    dtype: str | None,
    low_memory: bool | None,
) -> None:
    """Evaluate MODEL: samples against real pictures, and what its exact likelihood says.

    \b
    mlx-starflow evaluate my-model --data pictures
    mlx-starflow evaluate my-model --data pictures --held-out others -o evaluation --count 50000
    mlx-starflow evaluate my-model --statistics imagenet.npz --inception pt_inception-2015-12-05-6726825d.pth
    mlx-starflow evaluate my-model --data pictures --prompt-file geneval.jsonl --clip clip-folder

    FID, KID with its standard error, precision and recall, and a CLIP score; exact NLL, prompt fit and typicality;
    and whether the model has memorized: how close samples come to training pictures, and how much more likely those
    are than held-out ones. With -o, Ctrl-C loses at most 64 pictures, and the same command goes on.
    """
    from mlx_starflow.errors import StarflowError
    from mlx_starflow.evaluation import EvaluationSettings, read_prompts, read_statistics, write_statistics
    from mlx_starflow.evaluation import evaluate as measure
    from mlx_starflow.evaluation.statistics import check_statistics_name
    from mlx_starflow.media.tables import write_json
    from mlx_starflow.pipelines import VideoPipeline, open_model

    if data is None and statistics is None:
        raise click.UsageError("there is nothing to compare samples with: give --data, or --statistics")
    if save_statistics is not None:
        check_statistics_name(save_statistics)
    real = _spread(_found(data, split), limit)
    unseen = _found(held_out, None) if held_out is not None else _validation(data, split)
    read = [*files_read([path for path in (data, held_out) if path is not None], [*real, *unseen])]
    given = [path for path in (statistics, prompt_file, inception) if path is not None]
    claim_outputs([], [json_file, save_statistics], folders=[output], inputs=[*read, *given])
    prompts: list[ListedPrompt] | None = None if prompt_file is None else read_prompts(prompt_file)
    usual = None if statistics is None else read_statistics(statistics)
    network, scorer = _inception(features, inception, resize, needed=statistics is not None), _clip(clip)
    cpu.hint_if_slow()
    pipe = open_model(model, dtype=dtype, low_memory=low_memory, adapters=adapters)
    if isinstance(pipe, VideoPipeline):
        raise StarflowError(
            f"{model} makes videos, and this evaluates pictures: score its videos with mlx-starflow score"
        )
    sampling = pipe.settings.updated(
        guidance=guidance,
        temperature=temperature,
        method=method,
        attn_temp=attn_temp,
        denoise=denoise,
        size=size,
        kv_bits=kv_bits,
    )
    chosen = EvaluationSettings(
        count=count, seed=seed, batch_size=batch_size, likelihood=likelihood, draws=draws, verify=bool(verify)
    )
    hint = f"stopped; the same command goes on from {output}" if output else "stopped; with -o it could go on later"
    with resumable(hint):
        evaluation, of_data = measure(
            pipe,
            real,
            held_out=unseen,
            prompts=prompts,
            statistics=usual,
            features=network,
            clip=scorer,
            settings=chosen,
            sampling=sampling,
            folder=output,
            progress=None,
        )
    if save_statistics is not None and of_data is not None:
        write_statistics(of_data, save_statistics)
    if json_file is not None:
        write_json(evaluation.to_dict(), json_file)
    if json_file != Path("-"):
        for line in evaluation.lines():
            click.echo(line)


def _found(path: Path | None, split: str | None) -> Sequence[ImageFile]:
    from mlx_starflow.media.image_files import find_images

    return [] if path is None else find_images([path], split)


def _validation(data: Path | None, split: str) -> Sequence[ImageFile]:
    """The pictures of a folder that say that they were not trained on, if there are any."""
    from mlx_starflow.errors import StarflowError

    if data is None or not data.is_dir() or split != "train":
        return []
    try:
        return _found(data, "validation")
    except StarflowError:  # there are none
        return []


def _spread(files: Sequence[ImageFile], limit: int | None) -> Sequence[ImageFile]:
    if limit is None or limit >= len(files):
        return files
    return [files[number * len(files) // limit] for number in range(limit)]


def _inception(features: str, path: Path | None, resize: str, needed: bool) -> InceptionFeatures | None:
    """Inception-V3, or None for the model's own features. Raises StarflowError if it is asked for and not here."""
    from mlx_starflow.errors import StarflowError
    from mlx_starflow.evaluation import InceptionFeatures, find_inception
    from mlx_starflow.evaluation.features import missing_inception

    if features == "own":
        return None
    if path is not None:
        return InceptionFeatures(path, resize)
    found = find_inception()
    if found is not None:
        return InceptionFeatures(found, resize)
    if features == "inception" or resize != RESIZES[0] or needed:
        raise StarflowError(missing_inception(None))
    return None


def _clip(folder: Path | None) -> CLIPScorer | None:
    from mlx_starflow.evaluation import CLIPScorer

    return None if folder is None else CLIPScorer(folder)
