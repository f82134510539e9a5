"""Options about models of classes: which class, how it is guided, how samples are denoised, the noise level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_starflow.cli.options.sampling import with_options
from mlx_starflow.errors import StarflowError

if TYPE_CHECKING:
    from mlx_starflow.pipelines import GenerationSettings, Pipeline

Result = TypeVar("Result")


@dataclass(frozen=True)
class ClassOptions:
    """What is asked for of a model of classes; None: as the model has it.

    Attributes:
        prompts: the classes, by name or number.
        settings: what `ClassSettings.with_classes` takes.
    """

    prompts: list[str]
    settings: dict[str, Any]

    def apply(self, settings: GenerationSettings, model: str) -> GenerationSettings:
        """The settings with what is asked for. Raises StarflowError if the model has no classes."""
        from mlx_starflow.pipelines.results import ClassSettings

        if isinstance(settings, ClassSettings):
            return settings.with_classes(**self.settings)
        given = ["label"] * bool(self.prompts) + [name for name, value in self.settings.items() if value is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise StarflowError(f"{option} is for models of classes, and {model} is none: leave it out")
        return settings


_options = with_options(
    click.option("--label", "label", multiple=True, metavar="CLASS", help="A class, by name or number; repeatable."),
    click.option("--labels", metavar="CLASSES", help="Classes, by name or number, a comma between them."),
    click.option(
        "--annealed-guidance/--constant-guidance",
        default=None,
        help="Of classes: let guidance grow over the sequence, which is the default, or not.",
    ),
    click.option(
        "--guidance-mode",
        type=click.Choice(["starflow", "tarflow", "itarflow"]),
        help="Of classes: which guidance; the model's own by default.",
    ),
    click.option(
        "--guided-blocks", type=click.IntRange(min=1), help="Of classes: so many blocks are guided, the first sampled."
    ),
    click.option("--denoise-steps", type=click.IntRange(min=1), help="Of an iTARFlow's samples.  [default: 16]"),
    click.option("--stochastic", is_flag=True, help="These steps add fresh noise."),
    click.option("--clip", is_flag=True, help="These steps keep the clean picture in the range of pixels."),
)


def class_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add the options of models of classes; the command gets them as one, `labels`."""

    @wraps(command)
    def with_classes(*arguments: Any, label: tuple[str, ...], labels: str | None, **options: Any) -> Result:
        listed = [name.strip() for name in (labels or "").split(",")] if labels is not None else []
        names = ("annealed_guidance", "guidance_mode", "guided_blocks", "denoise_steps")
        settings = {name: options.pop(name) for name in names}
        settings |= {name: options.pop(name) or None for name in ("stochastic", "clip")}
        return command(*arguments, labels=ClassOptions([*label, *listed], settings), **options)

    return _options(with_classes)


def set_noise_level(pipe: Pipeline, level: float | None) -> None:
    """Have a model score at a noise level, if one is given. Raises StarflowError if it knows none."""
    from mlx_starflow.pipelines import ClassPipeline

    if level is None:
        return
    if not isinstance(pipe, ClassPipeline):
        raise StarflowError(f"--noise-level is for an iTARFlow, and {pipe.name} is none: leave it out")
    pipe.noise_level = level
