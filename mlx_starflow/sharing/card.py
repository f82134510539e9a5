"""The card of a model or an adapter: what it is, how it is used, its sizes, its likelihood, samples, and its licence.

Cards are README.md files with metadata in YAML before the text: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import yaml

from mlx_starflow.likelihood.calibration import CalibrationStatistics, describe
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.planning.summary import describe_model
from mlx_starflow.sharing.package import SAMPLES, Package, read_report
from mlx_starflow.training.loop.run_log import UNIT, read_log

APPLES = "apple-amlr"
"""The Hub's name of Apple's agreement."""

PAPERS = {
    "starflow": "[STARFlow](https://arxiv.org/abs/2506.06276)",
    "tarflow": "[TarFlow](https://arxiv.org/abs/2412.06329)",
    "itarflow": "iTARFlow",
}

_KINDS = {
    "starflow": ("text-to-image", "makes pictures of prompts"),
    "video": ("text-to-video", "makes videos of prompts"),
    "tarflow": ("unconditional-image-generation", "makes pictures of classes"),
    "itarflow": ("unconditional-image-generation", "makes pictures of classes"),
}


def make_card(package: Package, repository: str, licence: str | None = None) -> str:
    """The text of a card.

    Args:
        package: what is published.
        repository: where, owner/name.
        licence: its own, by the Hub's name of it, such as "cc-by-4.0"; None: none is named. Where Apple's agreement
            holds it is that one.

    Raises:
        StarflowError: a file that says something of it is damaged.
    """
    name = repository.partition("/")[2]
    about = _metadata(package, licence)
    sections = [f"# {name}", _summary(package), *_samples(package), *_use(package, repository), *_sizes(package)]
    sections += [*_likelihood(package), *_licence(package, about.get("license"))]
    head = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(package: Package, licence: str | None) -> dict[str, object]:
    named = APPLES if package.is_apples else licence
    about: dict[str, object] = {"license": named} if named else {}
    about |= {"library_name": "mlx-starflow", "pipeline_tag": _kind(package)[0]}
    tags = ["mlx", "mlx-starflow", "normalizing-flow"]
    if package.adapter is not None:
        tags.append(package.adapter.kind)
        if package.base is not None and "/" in package.base:
            about |= {"base_model": package.base, "base_model_relation": "adapter"}
    return {**about, "tags": tags}


def _kind(package: Package) -> tuple[str, str]:
    """The Hub's word for what it makes, and ours."""
    if package.model is None:
        return _KINDS["starflow"]
    content = package.model.flow.content
    return _KINDS["video" if content.get("vid_size") else str(content["model_type"])]


def _summary(package: Package) -> str:
    flow = "a normalizing flow, whose likelihood is exact, and which is inverted to make what it makes"
    if package.adapter is not None:
        base = package.base or "its base"
        return (
            f"A {package.adapter.kind.upper().replace('LORA', 'LoRA').replace('DORA', 'DoRA')} adapter of rank "
            f"{package.adapter.config.get('rank', 'unknown')} for {base}, {flow}."
        )
    assert package.model is not None
    paper = PAPERS[str(package.model.flow.content["model_type"])]
    return f"A {paper} model that {_kind(package)[1]}: {flow}. For mlx-starflow, in MLX."


def _samples(package: Package) -> Iterator[str]:
    if SAMPLES in package.files:
        prompts = f"\n\n{'; '.join(package.prompts)}" if package.prompts else ""
        yield f"## Samples\n\n![Samples]({SAMPLES}){prompts}"


def _use(package: Package, repository: str) -> Iterator[str]:
    prompt = package.prompts[0] if package.prompts else "a red apple"
    quoted = '"' + prompt.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`") + '"'
    if package.adapter is not None:
        base = package.base or "MODEL"
        command = f"mlx-starflow generate {quoted} -m {base} --lora {repository} 1"
        python = f'load("{base}", adapters=[("{repository}", 1.0)])'
    else:
        tag = _kind(package)[0]
        verb = "video" if tag == "text-to-video" else "generate"
        option = "--label 0" if tag.startswith("unconditional") else quoted
        command, python = f"mlx-starflow {verb} {option} -m {repository}", f'load("{repository}")'
    yield f"## Use\n\n```sh\n{command}\n```\n\n```python\nfrom mlx_starflow import load\n\npipe = {python}\n```"


def _sizes(package: Package) -> Iterator[str]:
    if package.model is not None:
        rows = describe_model(package.model)
    else:
        assert package.adapter is not None
        layers = package.adapter.layers
        numbers = sum(array.size for parts in layers.values() for array in parts.values())
        rows = {"adapter": f"{len(layers)} layers, {numbers / 1e6:.2f} M parameters"}
    yield "## Sizes\n\n" + _table(("part", "size"), list(rows.items()))


def _likelihood(package: Package) -> Iterator[str]:
    """What has been measured, if anything has."""
    rows = [*_calibrated(package.model), *_validated(package), *_finetuned(package)]
    if rows:
        yield f"## Negative log-likelihood, {UNIT}\n\n" + _table(("of", "NLL"), rows)


def _calibrated(model: ModelDirectory | None) -> Iterator[tuple[str, str]]:
    if model is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statistics of other weights are not mentioned
        found = CalibrationStatistics.find(model.path)
    if found is None:
        return
    for kind, statistics in found.nll.items():
        which = "with their prompts" if kind == "prompted" else "without a prompt"
        yield f"{found.images} pictures, {which}, mean and spread", describe(statistics)


def _validated(package: Package) -> Iterator[tuple[str, str]]:
    """The best validation of the training that wrote the model into its folder."""
    if package.model is None:
        return
    rows = [row for row in read_log(package.folder / "training/flow") if row.get("best") is True]
    if rows and isinstance(rows[-1].get("validation_nll"), int | float):
        error = rows[-1].get("standard_error")
        spread = f" +- {error:.4f}" if isinstance(error, int | float) else ""
        yield "held-out pictures of its training", f"{rows[-1]['validation_nll']:.4f}{spread}"


def _finetuned(package: Package) -> Iterator[tuple[str, str]]:
    report = read_report(package)
    values = {key: report.get(key) for key in ("before", "after", "change", "standard_error")}
    before, after, change, error = (value if isinstance(value, int | float) else math.nan for value in values.values())
    if math.isfinite(before) and math.isfinite(after):
        yield "held-out pictures, the base", f"{before:.4f}"
        yield "the same, after fine-tuning", f"{after:.4f} ({change:+.4f} +- {error:.4f})"


def _licence(package: Package, named: object) -> Iterator[str]:
    lines = [f"License: {named}." if named else "No licence is named: ask whoever published this before you use it."]
    if package.is_apples:
        lines.append(
            "The weights are Apple's, or made of Apple's: the Apple Machine Learning Research Model License Agreement "
            "(LICENSE_MODEL of https://github.com/apple/ml-starflow) holds for them, which is for research only."
        )
    for name, text in package.notices.items():
        lines.append(f"`{name}`, which goes with the files:\n\n```\n{text.replace('```', chr(39) * 3).strip()}\n```")
    yield "## Licence and attribution\n\n" + "\n\n".join(lines)


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = [head, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
