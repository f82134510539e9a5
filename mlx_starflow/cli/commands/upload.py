"""`mlx-starflow upload`: a model or an adapter to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow.cli.options.outputs import claim_outputs
from mlx_starflow.cli.options.vocabulary import model_argument


@click.command()
@model_argument(default=None, metavar="DIR", then="repository")
@click.argument("repository", required=False, metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Nobody else sees the repository.")
@click.option("--licence", metavar="NAME", help="Of your work, by the Hub's name, such as mit or cc-by-4.0.")
@click.option("-p", "--prompt", "prompts", multiple=True, help="Of a sample for the card; give it again for more.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the first sample.")
@click.option(
    "--i-have-read-the-licence",
    "accepts_agreement",
    is_flag=True,
    help="The agreement about Apple's weights, and whatever is made of them, lets you publish this.",
)
@click.option("--overwrite", is_flag=True, help="Replace files of a repository, and a card, that are there.")
@click.option("--dry-run", is_flag=True, help="Write the card into DIR, say what would be sent, and send nothing.")
def upload(
    model: str,
    repository: str,
    private: bool,
    licence: str | None,
    prompts: tuple[str, ...],
    seed: int,
    accepts_agreement: bool,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Publish the model or the adapter in DIR on the Hugging Face Hub, as USER/NAME.

    \b
    mlx-starflow upload my-model jane/my-model --licence cc-by-4.0 --dry-run
    mlx-starflow upload run/adapter jane/rex --private -p "a photo of rex the dog"

    DIR is a model directory, an adapter's folder, or finetune's RUN. Its weights, configs, licences and a card are
    sent: what it is, its sizes, its likelihood as far as it has been measured, and samples: those of the training, or
    of each PROMPT. A README.md in DIR is taken as the card, so you can change what --dry-run has written.

    You need an account: hf auth login.
    """
    from mlx_starflow.media.files import replacing
    from mlx_starflow.sharing import make_card, pack, send
    from mlx_starflow.sharing.package import CARD, SAMPLES
    from mlx_starflow.sharing.send import check_repository, check_token

    check_repository(repository)
    if not dry_run:
        check_token()
    package = pack(model, prompts=prompts, seed=seed, accepts_agreement=accepts_agreement, progress=None)
    if licence is not None and package.is_apples:
        raise click.UsageError("--licence: these weights are Apple's, or made of them, and have theirs: leave it out")
    own = package.card is not None and not (dry_run and overwrite)
    card = (package.card if own else None) or make_card(package, repository, licence)
    files: dict[str, Path | bytes] = {**package.files, CARD: card.encode()}
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        click.echo(f"{size / 1e6:10,.2f} MB  {name}")
    path = package.folder / CARD
    if own:
        click.echo(f"the card is {path}, as it is")
    if SAMPLES not in package.files:
        click.echo("there are no samples: -p PROMPT makes some", err=True)
    if not dry_run:
        address = send(repository, files, private=private, replace=overwrite, report=click.echo)
        click.echo(f"published {'for you alone' if private else 'for all'}: {address}")
        return
    if not own:
        claim_outputs([], [None if overwrite else path])
        with replacing(path, failure=f"cannot write {path}") as temporary:
            temporary.write_text(card, encoding="utf-8")
        click.echo(f"{path} is written")
    click.echo(f"would be sent to {repository}, {'private' if private else 'public'}; nothing was")
